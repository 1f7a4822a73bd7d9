"""`edge-agent`: what the device engineer and the technician type.

Data goes to stdout, everything else to stderr; `--json` prints what a program can read. Each verb is a function from
parsed arguments to an exit code. While the daemon runs, verbs go through its control socket. The daemon itself starts
here too, so that what only some verbs need is imported by them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from agent import __version__, config, lineconfig, screen
from agent.errors import AgentError, ConfigError, Reason
from agent.errors import exit_code as agent_exit_code
from ota.errors import OtaError

_Verb = Callable[[argparse.Namespace], int]


class _Add(Protocol):
    """Adds a verb to the command."""

    def __call__(self, name: str, verb: _Verb, text: str, *, needs_config: bool = True) -> argparse.ArgumentParser: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = argparse.Namespace()
    try:
        args = parser.parse_args(argv)
        if not hasattr(args, "verb"):
            parser.print_help(sys.stderr)
            return agent_exit_code(Reason.BAD_USAGE)
        verb: _Verb = args.verb
        return verb(args)
    except (AgentError, OtaError) as e:
        return screen.complain(e, as_json=getattr(args, "json", False))
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


# --- verbs -----------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from agent import logs, service

    logs.set_up(args.log_level)
    return service.run_daemon(config.load(args.config), os.environ)


def _status(args: argparse.Namespace) -> int:
    from agent import client

    status = client.ask(client.located(args.config), "GET", "/modules" if args.modules else "/status")
    if args.modules:
        return screen.answer(args, status)
    if args.json:
        print(json.dumps(status, indent=1))
    else:
        screen.status(status)
    return 0


def _metrics(args: argparse.Namespace) -> int:
    from agent import client

    sys.stdout.write(client.ask_text(client.located(args.config), "GET", "/metrics"))
    return 0


def _update(args: argparse.Namespace) -> int:
    from agent import client

    if (args.line is None) is (args.action != "check"):
        wanted = f"{args.action} needs a LINE" if args.line is None else "check takes no LINE"
        raise ConfigError(Reason.BAD_USAGE, wanted, hint="edge-agent status lists the lines")
    body = {} if args.line is None else {"line": args.line}
    answer = client.ask(client.located(args.config), "POST", f"/{args.action}", body, timeout_s=client.WORK_TIMEOUT_S)
    return screen.answer(args, answer)


def _rollback(args: argparse.Namespace) -> int:
    from agent import client

    loaded = client.located(args.config)
    return screen.answer(
        args, client.ask(loaded, "POST", "/rollback", {"line": args.line}, timeout_s=client.WORK_TIMEOUT_S)
    )


def _sideload(args: argparse.Namespace) -> int:
    from agent import stickverb

    return stickverb.sideload(args)


def _clock(args: argparse.Namespace) -> int:
    from agent.daemon import clock

    floor = clock.read_floor(config.load(args.config).state_dir)
    if floor.damaged or floor.beyond:
        ignored = f"{floor.damaged} damaged records and {floor.beyond} dates too far ahead are ignored"
        print(f"note: {ignored}", file=sys.stderr)
    verdict, before = clock.raise_clock(clock.SystemKernel(), floor.moment)
    shown = {"verdict": verdict.value, "clock": before.isoformat(), "floor": floor.moment.isoformat()}
    return screen.answer(args, shown)


def _capture(args: argparse.Namespace) -> int:
    from agent import captureverb

    return captureverb.run(args)


def _profile(args: argparse.Namespace) -> int:
    from agent import profileverbs

    return profileverbs.run(args)


def _enroll(args: argparse.Namespace) -> int:
    from agent import lifeverbs

    return lifeverbs.enroll(args)


def _reset(args: argparse.Namespace) -> int:
    from agent import lifeverbs

    return lifeverbs.reset(args)


def _keys(args: argparse.Namespace) -> int:
    from agent import client

    loaded = config.load(args.config)
    storage = args.storage or not args.hpke
    if (args.action != "rotate" and (args.storage or args.hpke)) or (args.action != "seal" and args.keep_tls):
        raise ConfigError(Reason.BAD_USAGE, f"keys {args.action} takes no such option", hint="edge-agent keys --help")
    if client.daemon_runs(loaded):
        method, path = ("GET", "/keys") if args.action == "show" else ("POST", f"/keys/{args.action}")
        body = {"storage": storage, "hpke": args.hpke, "keep_tls": args.keep_tls} if args.action != "show" else None
        answer = client.ask(loaded, method, path, body, timeout_s=client.WORK_TIMEOUT_S)
    else:
        from agent import logs, service

        logs.set_up("ERROR")
        answer = service.keys_once(
            loaded, os.environ, args.action, storage=storage, hpke=args.hpke, keep_tls=args.keep_tls
        )
    return screen.answer(args, answer)


def _config_check(args: argparse.Namespace) -> int:
    from agent import profile, workbench

    loaded = config.load(args.config)
    chosen = profile.recognise(loaded.profile, profile.load_all())
    if loaded.worker_python is not None:
        from agent.daemon.interpreter import check_interpreter

        print(f"workers: {loaded.worker_python}, Python {check_interpreter(loaded.worker_python)}")
    for source in loaded.sources:
        opened = asyncio.run(workbench.probe(source, args.config.parent, loaded.worker_python))
        print(f"source {source.name}: {opened.size} at {opened.fps:g} fps")
    print(f"{args.config}: {len(loaded.sources)} sources, {len(loaded.lines)} lines, profile {chosen.name}")
    return 0


def _config_show(args: argparse.Namespace) -> int:
    from agent import client

    loaded = config.load(args.config)
    if client.daemon_runs(loaded):
        return screen.answer(args, client.ask(loaded, "GET", "/config"))
    from agent import service

    return screen.answer(args, service.config_once(loaded, None))


def _config_apply(args: argparse.Namespace) -> int:
    from agent import client

    loaded = config.load(args.config)
    if args.file is None:
        raise ConfigError(Reason.BAD_USAGE, "apply needs a FILE", hint="edge-agent config apply FILE")
    try:
        text = args.file.read_text()
    except (OSError, ValueError) as e:
        raise ConfigError(Reason.BAD_CONFIG, f"{args.file}: {e}", hint="name a file with settings") from e
    if client.daemon_runs(loaded):
        return screen.answer(args, client.apply_settings(loaded, text))
    from agent import service

    return screen.answer(args, service.config_once(loaded, text))


def _config_example(_: argparse.Namespace) -> int:
    sys.stdout.write(config.example())
    return 0


def _bench(args: argparse.Namespace) -> int:
    from agent import benchverb, profile

    return benchverb.run(args, _ladder(args, profile), *_graph(args))


def _infer(args: argparse.Namespace) -> int:
    from agent import profile, workbench

    delegates = workbench.delegates_for(workbench.format_of(args.model), _ladder(args, profile))
    graph, outputs = _graph(args)
    failed: list[tuple[str, AgentError]] = []
    for delegate in delegates:
        try:
            run = workbench.infer(args.model, args.image, delegate, graph, outputs, args.worker_python)
            loaded, result = asyncio.run(run)
        except AgentError as e:
            if e.reason not in workbench.ANOTHER_MAY_RUN_IT:
                raise
            failed.append((delegate, e))
            continue
        for name, error in failed:
            print(f"note: not on {name}: {screen.printable(error.message)} [{error.reason.value}]", file=sys.stderr)
        screen.inference(args, loaded.actual, result.stages_us, result.items)
        return 0
    raise workbench.none_runs(args.model, [error for _, error in failed])


def _ladder(args: argparse.Namespace, profile: Any) -> Sequence[str]:
    if args.delegate:
        if args.delegate not in profile.DELEGATES:
            raise ConfigError(
                Reason.UNKNOWN_DELEGATE,
                f"delegate {args.delegate!r} is unknown",
                hint=f"known: {', '.join(profile.DELEGATES)}",
            )
        return [args.delegate]
    ladder: Sequence[str] = profile.recognise("auto", profile.load_all()).delegates
    return ladder


def _graph(args: argparse.Namespace) -> tuple[Mapping[str, Any], Sequence[str]]:
    """How the model is fed and read: from its spec, or plainly where none is given."""
    from agent import workbench

    if args.spec is None:
        print("note: no --spec: the picture is stretched and divided by 255, tensors are shown raw", file=sys.stderr)
        return workbench.DEFAULT_GRAPH, []
    from ota.publisher import spec

    # a spec that lists no components is one for `edge-ota release --from MODEL`
    loaded = spec.load(args.spec, model=None if spec.lists_components(args.spec) else args.model)
    mine = [c for c in loaded.components if c.file.name == args.model.name]
    return loaded.graph, mine[0].outputs if mine else ()


# --- arguments -------------------------------------------------------------------------------------------------------


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal. Left to itself it asks shutil, also where no help is printed: 0.6 MB in the daemon."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=screen.columns() - 2)


class _Parser(argparse.ArgumentParser):
    """A wrong command line is an error like any other."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        """See `argparse`."""
        raise ConfigError(Reason.BAD_USAGE, message, hint=f"{self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="edge-agent", description="Runs signed, encrypted models on this device.")
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, verb: _Verb, text: str, *, needs_config: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=verb)
        sub.add_argument("--json", action="store_true", help="print what a program can read")
        if needs_config:
            sub.add_argument("--config", type=Path, default=config.DEFAULT_PATH, metavar="FILE", help="agent.toml")
        return sub

    run = add("run", _run, "the daemon; what the systemd service starts")
    run.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    status = add("status", _status, "what runs, on which delegate and why, how the last update ended")
    status.add_argument("--modules", action="store_true", help="the Python modules the daemon has loaded, instead")
    add("metrics", _metrics, "figures in the Prometheus text format")
    add("clock", _clock, "raise the system clock to the newest signed date; what edge-agent-clock.service starts")
    profiles = add("profile", _profile, "explain which device profile this board has and why, or list all of them")
    profiles.add_argument("action", choices=("explain", "list"))
    profiles.add_argument("--root", type=Path, metavar="DIR", help="a copy of another board's /proc and /sys, instead")
    captures = add("capture", _capture, "pictures that rules kept, sealed to the operator: list them, or copy them")
    captures.add_argument("action", choices=("list", "copy"))
    captures.add_argument("--to", type=Path, metavar="DIR", help="copy: where to, such as a stick")
    _add_updates(add)
    _add_custody(add)
    _add_settings(add)
    _add_workbench(add)
    return parser


def _add_updates(add: _Add) -> None:
    update = add("update", _update, "look for a new release now, stop a running update, or lift a quarantine")
    update.add_argument(
        "action",
        nargs="?",
        choices=("check", "cancel", "retry"),
        default="check",
        help="check looks now; cancel ends the update of LINE; retry lets its quarantined releases be tried again",
    )
    update.add_argument("line", nargs="?", metavar="LINE")
    add("rollback", _rollback, "serve the release before the present one").add_argument("line", metavar="LINE")
    stick = add("sideload", _sideload, "install a release from a stick, without a network")
    stick.add_argument(
        "path", type=Path, nargs="?", metavar="PATH", help="the directory or .zip that edge-ota bundle wrote"
    )
    stick.add_argument(
        "--allow-expired", action="store_true", help="operators only: take a stick whose dates are past; it is recorded"
    )
    stick.add_argument(
        "--socket",
        action="store_true",
        help="answer on the socket from systemd; what edge-agent-sideload.service starts",
    )


def _add_custody(add: _Add) -> None:
    enroll = add("enroll", _enroll, "make the enrolment request, or install the bundle that answers it")
    group = enroll.add_mutually_exclusive_group(required=True)
    group.add_argument("--device", metavar="ID", help="make keys and a request for this device id")
    group.add_argument("--bundle", type=Path, metavar="FILE", help="install the operator's answer")
    group.add_argument("--server", metavar="URL", help="enrol in one step, with a token, at edge-ota listen")
    enroll.add_argument("--token", metavar="TOKEN", help="with --server: what edge-ota token printed; - for stdin")
    enroll.add_argument("--out", type=Path, metavar="FILE", help="where the request goes; stdout if absent")
    wipe = add("reset", _reset, "factory reset: destroy keys, models, enrolment and settings of this device")
    wipe.add_argument("--yes", action="store_true", help="do not ask")
    wipe.add_argument("--owner", action="store_true", help="it changes hands: keep no record that names the old owner")
    keys = add("keys", _keys, "ids and custody of the device's keys; rotate them; move them under a sealed credential")
    keys.add_argument("action", choices=("show", "rotate", "seal"))
    keys.add_argument("--storage", action="store_true", help="rotate what the models are sealed under (the default)")
    keys.add_argument("--hpke", action="store_true", help="rotate what grants are made for; three are kept")
    keys.add_argument(
        "--keep-tls", action="store_true", help="seal all but the TLS key: the device can report that its TPM is gone"
    )


def _add_settings(add: _Add) -> None:
    settings = add("config", _config_check, "test agent.toml, print an example, or try other settings")
    actions = {"check": _config_check, "example": _config_example, "show": _config_show, "apply": _config_apply}
    settings.add_argument(
        "action",
        choices=tuple(actions),
        help="check tests agent.toml; example prints one; show tells which settings are in force; "
        "apply tries the settings in FILE and goes back if they do not work",
    )
    settings.add_argument("file", nargs="?", type=Path, metavar="FILE", help="settings to apply: a whole agent.toml")
    settings.set_defaults(verb=lambda args: actions[args.action](args))


def _add_workbench(add: _Add) -> None:
    for name, verb, text in (
        ("bench", _bench, "measure a model file on every delegate of this board"),
        ("infer", _infer, "run a model file on one picture"),
    ):
        sub = add(name, verb, text, needs_config=False)
        sub.add_argument("model", type=Path, metavar="MODEL", help="a .tflite, .onnx or .ovir file")
        if name == "bench":
            sub.add_argument(
                "--objective", choices=lineconfig.OBJECTIVES, default="latency", help="what the best is the best for"
            )
            sub.add_argument("--svg", type=Path, metavar="FILE", help="draw the table into a picture as well")
        if name == "infer":
            sub.add_argument("image", type=Path, metavar="IMAGE", help="a PNG or JPEG file")
        sub.add_argument("--spec", type=Path, metavar="FILE", help="spec.toml with preprocess, postprocess and labels")
        sub.add_argument("--delegate", metavar="NAME", help="only this one, such as litert:xnnpack")
        sub.add_argument("--worker-python", type=Path, metavar="PATH", help="the workers' interpreter, if another one")
