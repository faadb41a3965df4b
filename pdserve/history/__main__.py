"""``python -m pdserve.history FOLDER``: check the histories of a cluster, or draw them."""

import argparse
import sys
from pathlib import Path

from pdserve.history.checker import check, summary
from pdserve.history.files import MalformedHistory, read_folder
from pdserve.history.timeline import render


def main() -> int:
    """Exit 0 if every rule holds, 1 if not, 2 if these are no histories."""
    parser = argparse.ArgumentParser(
        prog="python -m pdserve.history",
        description="Check the event histories that processes wrote with history.path set.",
    )
    parser.add_argument("folder", type=Path, help="where they are")
    parser.add_argument(
        "--quiet-cluster",
        action="store_true",
        help="nothing was in flight at the end: what is held or unended then is a finding",
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="draw a timeline as well")
    arguments = parser.parse_args()
    try:
        histories = read_folder(arguments.folder)
    except MalformedHistory as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = check(histories, is_quiet=arguments.quiet_cluster)
    if arguments.html is not None:
        arguments.html.write_text(render(histories, found), encoding="utf-8")
    for each in found:
        print(each)
    count = f"{len(found)} finding{'s' if len(found) != 1 else ''}" if found else "ok"
    print(f"{count}: {summary(histories)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
