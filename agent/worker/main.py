"""Entry of every process on the unprivileged side: `python -m agent.worker.main ROLE …`.

Roles: `host` (starts and reaps the others), `source`, `model`, `trial`, `transform`, and `describe`, the publisher's
throw-away run over models. It is not a place for behaviour: each role lives in its own module.
Invariant: a role imports nothing of another role's, so that a source never loads a runtime and the host loads no numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from agent.worker.delegates import DELEGATES, DelegateLoader
from agent.worker.sources import SOURCES, SourceOpener

ENTRY = ("-m", "agent.worker.main")
"""Arguments after the interpreter's name that start this program again."""


def main(
    argv: Sequence[str],
    *,
    delegates: Mapping[str, DelegateLoader] = DELEGATES,
    sources: Mapping[str, SourceOpener] = SOURCES,
    entry: Sequence[str] = ENTRY,
) -> int:
    """Run one role and return its exit status.

    Args:
        argv: the role and its options, without the program's name.
        delegates: every delegate a model worker may load, by name.
        sources: every kind of source, by name.
        entry: how the host starts this very program for a worker.
    """
    args = _parser().parse_args(argv)
    if args.role == "host":
        from agent.worker import host

        return host.run(args.fd, args.connect, entry)
    if args.role == "describe":
        from agent.worker import describe

        return describe.run(args.request, args.out, delegates)

    from agent.worker import channel

    channel.confine(args.parent)
    link = channel.Channel(args.fd)
    if args.role == "source":
        from agent.worker import source

        return source.run(link, sources)
    if args.role == "transform":
        from agent.worker import transform

        return transform.run(link)
    from agent.worker import serve

    return serve.run(link, delegates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.worker.main", description=(__doc__ or "").splitlines()[0])
    roles = parser.add_subparsers(dest="role", required=True)
    host = roles.add_parser("host", help="start, watch and reap workers for the daemon")
    where = host.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, default=-1, help="descriptor of the socket to the daemon")
    where.add_argument("--connect", default="", help="path of the daemon's socket; connects again whenever it closes")
    for role in ("source", "model", "trial", "transform"):
        worker = roles.add_parser(role)
        worker.add_argument("--fd", type=int, required=True, help="descriptor of the socket to the daemon")
        worker.add_argument("--parent", type=int, default=0, help="process id of the host; ends when that one is gone")
    describe = roles.add_parser("describe", help="tensor specs of models, and their golden vectors")
    describe.add_argument("--request", required=True, help="JSON file: models, outputs, graph, images")
    describe.add_argument("--out", required=True, help="folder for facts.json, golden.npz and tolerance.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
