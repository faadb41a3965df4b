"""One model on several processes: ``tp`` lanes times ``pp`` stages, and a leader.

The leader is the worker: scheduler, loop and gRPC.  Its executor sends every plan to all ranks,
from one place, over a socket pair each; ranks compute their share of it, exchange sums and rows
among themselves, and the first rank of the last stage samples.  What it sampled comes back to
the leader, which passes it on to the ranks that embed it.  Several plans are under way at once,
each in another stage.

Each rank's pool is memory that the leader maps too, so that one transfer agent serves them all.
"""
