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
from typing import Any, NoReturn

from agent import __version__, config
from agent.errors import AgentError, ConfigError, Reason
from agent.errors import exit_code as agent_exit_code
from ota.errors import OtaError
from ota.errors import exit_code as ota_exit_code

SIDELOAD_TIMEOUT_S = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = argparse.Namespace()
    try:
        args = parser.parse_args(argv)
        if not hasattr(args, "verb"):
            parser.print_help(sys.stderr)
            return agent_exit_code(Reason.BAD_USAGE)
        verb: Callable[[argparse.Namespace], int] = args.verb
        return verb(args)
    except AgentError as e:
        return _complain(args, e.reason.value, e.message, e.hint, agent_exit_code(e.reason))
    except OtaError as e:
        return _complain(args, e.reason.value, e.message, e.hint, ota_exit_code(e.reason))
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def _complain(args: argparse.Namespace, reason: str, message: str, hint: str, code: int) -> int:
    if getattr(args, "json", False):
        print(json.dumps({"reason": reason, "message": message, "hint": hint}))
    print(f"error: {_printable(message)} [{reason}]", file=sys.stderr)
    if hint:
        print(f"hint: {_printable(hint)}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    """Names come from models, sticks and peers: a terminal must not obey them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# --- verbs -----------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from agent import app, logs

    logs.set_up(args.log_level)
    return app.run_daemon(config.load(args.config), os.environ)


def _status(args: argparse.Namespace) -> int:
    from agent import client

    status = client.ask(config.load(args.config), "GET", "/modules" if args.modules else "/status")
    if args.modules:
        return _answer(args, status)
    if args.json:
        print(json.dumps(status, indent=1))
    else:
        _print_status(status)
    return 0


def _metrics(args: argparse.Namespace) -> int:
    from agent import client

    sys.stdout.write(client.ask_text(config.load(args.config), "GET", "/metrics"))
    return 0


def _check(args: argparse.Namespace) -> int:
    from agent import client

    return _answer(args, client.ask(config.load(args.config), "POST", "/check"))


def _rollback(args: argparse.Namespace) -> int:
    from agent import client

    loaded = config.load(args.config)
    return _answer(args, client.ask(loaded, "POST", "/rollback", {"line": args.line}, timeout_s=SIDELOAD_TIMEOUT_S))


def _sideload(args: argparse.Namespace) -> int:
    from agent import client

    loaded = config.load(args.config)
    if not args.path.is_dir():
        raise ConfigError(
            Reason.BAD_USAGE, f"{args.path} is not a directory", hint="edge-ota bundle REPO DEVICE DIRECTORY makes one"
        )
    body = {"path": str(args.path.absolute())}
    if client.daemon_runs(loaded):
        answer = client.ask(loaded, "POST", "/sideload", body, timeout_s=SIDELOAD_TIMEOUT_S)
    else:
        from agent import app, logs

        logs.set_up("ERROR")  # how the update ended is this command's answer
        answer = app.sideload_once(loaded, os.environ, args.path.absolute())
    return _answer(args, answer)


def _enroll(args: argparse.Namespace) -> int:
    from agent.daemon import enroll, keys

    loaded = config.load(args.config)
    custody = keys.FileKeys(loaded.state_dir / "keys")
    try:
        if args.bundle is not None:
            done = enroll.install(enroll.read(args.bundle), custody.load(), loaded.state_dir)
            return _answer(args, {"device": done.device, "tenant": done.tenant, "broker": f"{done.host}:{done.port}"})
        request = enroll.request(enroll.check_device(args.device), custody.create())
        if args.out is None:
            sys.stdout.write(request.decode())
        else:
            args.out.write_bytes(request)
            print(
                f"wrote {args.out}; next: edge-ota enroll REPO {args.out.name} --broker HOST:PORT --out bundle.json",
                file=sys.stderr,
            )
    except OSError as e:
        raise ConfigError(
            Reason.STATE_UNWRITABLE,
            f"{e.filename}: {e.strerror}",
            hint="run as the user of the service, or set state_dir",
        ) from e
    return 0


def _config_check(args: argparse.Namespace) -> int:
    from agent import profile, workbench

    loaded = config.load(args.config)
    chosen = profile.recognise(loaded.profile, profile.load_all())
    for source in loaded.sources:
        opened = asyncio.run(workbench.probe(source))
        print(f"source {source.name}: {opened.width}x{opened.height} at {opened.fps:g} fps")
    print(f"{args.config}: {len(loaded.sources)} sources, {len(loaded.lines)} lines, profile {chosen.name}")
    return 0


def _config_example(_: argparse.Namespace) -> int:
    sys.stdout.write(config.example())
    return 0


def _bench(args: argparse.Namespace) -> int:
    from agent import profile, workbench

    ladder = _ladder(args, profile)
    graph, outputs = _graph(args)
    verdicts = asyncio.run(workbench.bench(args.model, ladder, graph, outputs))
    if args.json:
        print(json.dumps([v.to_json() for v in verdicts], indent=1))
    else:
        _print_verdicts([v.to_json() for v in verdicts])
    workbench.best_delegate(verdicts)
    return 0


def _infer(args: argparse.Namespace) -> int:
    from agent import profile, workbench

    delegates = workbench.delegates_for(workbench.format_of(args.model), _ladder(args, profile))
    graph, outputs = _graph(args)
    failed: list[tuple[str, AgentError]] = []
    for delegate in delegates:
        try:
            loaded, result = asyncio.run(workbench.infer(args.model, args.image, delegate, graph, outputs))
        except AgentError as e:
            if e.reason not in workbench.ANOTHER_MAY_RUN_IT:
                raise
            failed.append((delegate, e))
            continue
        for name, error in failed:
            print(f"note: not on {name}: {_printable(error.message)} [{error.reason.value}]", file=sys.stderr)
        _print_inference(args, loaded.actual, result.stages_us, result.items)
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


# --- printing --------------------------------------------------------------------------------------------------------


def _answer(args: argparse.Namespace, answer: Mapping[str, Any]) -> int:
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        for key, value in answer.items():
            print(f"{key}: {_printable(str(value))}")
    return 0


def _print_status(status: Mapping[str, Any]) -> None:
    device = status["device"]
    print(f"device     {device['id']}  profile {device['profile']}  agent {device['agent']}")
    print(f"isolation  {status['isolation']}")
    print(f"custody    {status['custody']['kind']}: {status['custody']['worth']}")
    link = status["link"]
    detail = link["message"] or link["broker"]
    print(f"link       {link['state']} {_printable(detail)}")
    for name, source in status["sources"].items():
        print(f"source     {name}  {source['state']}  {source['frames']} frames {_printable(source['detail'])}")
    for name, line in status["lines"].items():
        update = line["update"]
        running = f"{line['version']} on {line['delegate']}" if line["delegate"] else "nothing runs"
        figures = f"{line['fps']:.1f} fps  p50 {line['p50_ms']:.2f} ms"
        print(f"line       {name}  {running}  {figures}  update {update['state']}")
        if update["reason"]:
            print(f"           last update: {update['outcome']} ({update['reason']}) {_printable(update['message'])}")
        _print_verdicts(line["verdicts"], indent="           ")
    for condition in status["conditions"]:
        print(f"condition  {condition['type']} {condition['status']}: {_printable(condition['message'])}")


def _print_verdicts(verdicts: Sequence[Mapping[str, Any]], indent: str = "") -> None:
    if not verdicts:
        return
    best = min((v["min_ms"] for v in verdicts if not v["reason"]), default=0.0)
    heads = f"{'min ms':>8} {'p50':>8} {'p95':>8} {'load':>8} {'RSS MB':>7}  verdict"
    print(f"{indent}{'delegate':16} {'component':14} {heads}")
    for v in verdicts:
        row = f"{indent}{v['requested']:16} {v['component'][:14]:14} "
        if v["reason"]:
            print(f"{row}{'-':>8} {'-':>8} {'-':>8} {'-':>8} {'-':>7}  {v['reason']}: {_printable(v['message'])[:90]}")
            continue
        word = "fastest" if v["min_ms"] == best else f"{v['min_ms'] / best:.1f}x slower" if best else ""
        figures = (
            f"{v['min_ms']:8.3f} {v['p50_ms']:8.3f} {v['p95_ms']:8.3f} {v['load_ms']:8.1f} {v['rss_bytes'] / 1e6:7.1f}"
        )
        print(f"{row}{figures}  {word}")


def _print_inference(args: argparse.Namespace, delegate: str, stages_us: Sequence[int], items: Sequence[Any]) -> None:
    if args.json:
        print(json.dumps({"delegate": delegate, "stages_us": list(stages_us), "items": list(items)}, indent=1))
        return
    _, pre, run, post = stages_us
    print(
        f"{delegate}: preprocess {pre / 1000:.2f} ms, inference {run / 1000:.2f} ms, postprocess {post / 1000:.2f} ms"
    )
    for item in items:
        print("  " + "  ".join(f"{key} {_printable(str(value))}" for key, value in item.items()))
    if not items:
        print("  nothing found")


# --- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A wrong command line is an error like any other."""

    def error(self, message: str) -> NoReturn:
        """See `argparse`."""
        raise ConfigError(Reason.BAD_USAGE, message, hint=f"{self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="edge-agent", description="Runs signed, encrypted models on this device.")
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, verb: Callable[[argparse.Namespace], int], text: str, *, needs_config: bool = True) -> Any:
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
    add("update", _check, "look for a new release now")
    add("rollback", _rollback, "serve the release before the present one").add_argument("line", metavar="LINE")
    add("sideload", _sideload, "install a release from a directory, without a network").add_argument(
        "path", type=Path, metavar="DIRECTORY"
    )
    enroll = add("enroll", _enroll, "make the enrolment request, or install the bundle that answers it")
    group = enroll.add_mutually_exclusive_group(required=True)
    group.add_argument("--device", metavar="ID", help="make keys and a request for this device id")
    group.add_argument("--bundle", type=Path, metavar="FILE", help="install the operator's answer")
    enroll.add_argument("--out", type=Path, metavar="FILE", help="where the request goes; stdout if absent")
    check = add("config", _config_check, "test agent.toml, or print an example")
    check.add_argument("action", choices=("check", "example"))
    check.set_defaults(verb=lambda args: _config_example(args) if args.action == "example" else _config_check(args))
    for name, verb, text in (
        ("bench", _bench, "measure a model file on every delegate of this board"),
        ("infer", _infer, "run a model file on one picture"),
    ):
        sub = add(name, verb, text, needs_config=False)
        sub.add_argument("model", type=Path, metavar="MODEL", help="a .tflite or .onnx file")
        if name == "infer":
            sub.add_argument("image", type=Path, metavar="IMAGE", help="a PNG or JPEG file")
        sub.add_argument("--spec", type=Path, metavar="FILE", help="spec.toml with preprocess, postprocess and labels")
        sub.add_argument("--delegate", metavar="NAME", help="only this one, such as litert:xnnpack")
    return parser
