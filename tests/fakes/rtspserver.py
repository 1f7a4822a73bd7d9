"""A real RTSP server with a test picture, as a process of its own: GStreamer's, under Debian's interpreter.

    rtspserver.py PORT [--size 320x240] [--fps 15] [--user NAME --password WORD]

Serves rtsp://127.0.0.1:PORT/cam until it is killed; prints `ready` when it listens. Needs gir1.2-gst-rtsp-server-1.0,
python3-gi and GStreamer's base, good and ugly plugins.
"""

from __future__ import annotations

import argparse

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

# a key frame a second, as cameras are set up
ENCODER = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max={fps} ! rtph264pay name=pay0 config-interval=1"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port")
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--fps", type=int, default=15)
    parser.add_argument("--user", default="")
    parser.add_argument("--password", default="")
    args = parser.parse_args()
    Gst.init(None)
    width, height = args.size.split("x")
    server = GstRtspServer.RTSPServer(service=args.port)
    server.set_address("127.0.0.1")
    factory = GstRtspServer.RTSPMediaFactory()
    picture = f"videotestsrc is-live=true ! video/x-raw,width={width},height={height},framerate={args.fps}/1"
    factory.set_launch(f"( {picture} ! {ENCODER.format(fps=args.fps)} )")
    factory.set_shared(True)
    if args.user:
        auth = GstRtspServer.RTSPAuth()
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(args.user, args.password), token)
        server.set_auth(auth)
        factory.add_role_from_structure(
            Gst.Structure.from_string("viewer, media.factory.access=true, media.factory.construct=true")[0]
        )
    server.get_mount_points().add_factory("/cam", factory)
    if server.attach(None) == 0:
        raise SystemExit(f"port {args.port} cannot be had")
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
