"""The bundled demo model: the grammar its text comes from, and the trained folder ``model/``."""
