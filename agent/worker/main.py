"""Entry of every process on the unprivileged side: `python -m agent.worker.main ROLE …`.

Roles: `host` (starts and reaps the others), `source`, `model`, `fused` (these two in one), `trial`, `transform`,
`zygote` (forks models for the host), and `describe`, the publisher's throw-away run over models. It is not a place for
behaviour: each role lives in its own module.
Invariant: a role imports what it is alone, so that a source never loads a runtime and the host loads no numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from agent.sourceconfig import NETWORK_KINDS
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
    parser = _parser()
    args = parser.parse_args(argv)
    if args.network:
        if args.role not in ("host", "source"):
            parser.error("nothing but sources has the network")
        sources, entry = {kind: sources[kind] for kind in NETWORK_KINDS}, (*entry, "--network")
    if args.role == "host":
        from agent.worker import host

        return host.run(args.fd, args.connect, entry, frozenset(delegates))
    if args.role == "describe":
        from agent.worker import describe

        return describe.run(args.request, args.out, delegates)

    from agent.worker import channel

    channel.confine(args.parent)
    link = channel.Channel(args.fd)
    if args.role == "source":
        from agent.worker import source

        return source.run(link, sources)
    if args.role == "fused":
        from agent.worker import fused

        return fused.run(link, sources, delegates)
    if args.role == "zygote":
        from agent.worker import zygote

        return zygote.run(link, args.parent, args.delegates.split(","), delegates)
    if args.role == "transform":
        from agent.worker import transform

        return transform.run(link)
    from agent.worker import serve

    return serve.run(link, delegates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.worker.main", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="store_true", help="run sources that need the network, and nothing else")
    roles = parser.add_subparsers(dest="role", required=True)
    host = roles.add_parser("host", help="start, watch and reap workers for the daemon")
    where = host.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, default=-1, help="descriptor of the socket to the daemon")
    where.add_argument("--connect", default="", help="path of the daemon's socket; connects again whenever it closes")
    for role in ("source", "model", "fused", "trial", "transform", "zygote"):
        worker = roles.add_parser(role)
        worker.add_argument("--fd", type=int, required=True, help="descriptor of the socket to the daemon")
        worker.add_argument("--parent", type=int, default=0, help="process id of the host; ends when that one is gone")
        if role == "zygote":
            worker.add_argument("--delegates", required=True, help="names, by commas, whose runtimes it imports")
    describe = roles.add_parser("describe", help="tensor specs of models, and their golden vectors")
    describe.add_argument("--request", required=True, help="JSON file: models, outputs, graph, images")
    describe.add_argument("--out", required=True, help="folder for facts.json, golden.npz and tolerance.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
