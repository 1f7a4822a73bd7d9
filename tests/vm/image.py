"""The disk of the virtual machine: a Debian with the product installed as the packages install it, a publisher with one
signed release, and a device that is enrolled with it. Everything slow is done here, natively; the machine only boots.

Needs root, the tree of the system tests, Debian's linux-image-amd64 (kernel, initrd and modules) and e2fsprogs.
"""

from __future__ import annotations

import re
import shutil
import site
import subprocess
from pathlib import Path

from tests.system.device import INSTALL, PACKAGES, SOURCE
from tests.system.tree import ROOT, tree

DISK_SIZE = "3G"
# what a daemon, a publisher and one runtime need; the rest of the environment would triple the disk
WITHOUT = ("openvino*", "mypy*", "*mypyc*", "onnx", "onnx-*", "pip*", "ruff*", "hypothesis*", "pytest*",
           "pygments*", "tensorflow*", "__pycache__")  # fmt: skip
SOURCES = ("agent", "ota", "packaging", "models", "device-profiles", "tests/vm/inside.sh", "tests/vm/camera.py",
           "tests/agent/worker/workerdriver.py", "tests/workerpython.py")  # fmt: skip
MODULES = ("kernel/fs/fat", "kernel/fs/nls")
DRIVERS = ("vivid",)
"""With every module that they need."""
CONFIG = """
workers = "unit"

[[source]]
name = "belt"
kind = "video"
path = "/srv/clip.avi"
policy = "live"
loop = true
fps = 2

[[line]]
name = "digits"
source = "belt"
explore = "never"
delegates = ["litert:xnnpack", "onnx:cpu"]

[telemetry]
interval_s = 5

[update]
poll_s = 20
probation_s = 1
probation_results = 2
load_timeout_s = 600
run_timeout_s = 300
"""


class Kernel:
    """The newest kernel of the host with its initrd and modules.

    Raises:
        FileNotFoundError: none is installed.
    """

    def __init__(self, boot: Path = Path("/boot")) -> None:
        found = sorted(boot.glob("vmlinuz-*-amd64"))
        if not found:
            raise FileNotFoundError("no kernel in /boot: apt-get install linux-image-amd64")
        self.image = found[-1]
        self.version = self.image.name.removeprefix("vmlinuz-")
        self.initrd = boot / f"initrd.img-{self.version}"
        self.modules = Path("/lib/modules") / self.version

    def shrink_initrd(self, folder: Path) -> None:
        """Use one with the three drivers that the machine has: the distribution's takes ten seconds to unpack there."""
        settings, small = folder / "initramfs-tools", folder / f"initrd-{self.version}.img"
        if not small.exists():
            shutil.rmtree(settings, ignore_errors=True)
            shutil.copytree("/etc/initramfs-tools", settings)
            (settings / "conf.d" / "vm.conf").write_text("MODULES=list\nCOMPRESS=gzip\n")
            (settings / "modules").write_text("virtio_pci\nvirtio_blk\next4\n")
            subprocess.run(["mkinitramfs", "-d", str(settings), "-o", str(small), self.version], check=True)
        self.initrd = small


def build(folder: Path, kernel: Kernel) -> Path:
    """Make `folder/disk.img`; about a minute and a half."""
    root, disk = folder / "root", folder / "disk.img"
    shutil.rmtree(root, ignore_errors=True)
    with tree() as clean:
        subprocess.run(["cp", "-a", "--one-file-system", str(clean), str(root)], check=True)
    packages = next(Path(p) for p in site.getsitepackages() if Path(p).is_dir())
    _copy(packages, root / PACKAGES.lstrip("/"), WITHOUT)
    for name in SOURCES:
        target = root / SOURCE.lstrip("/") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            _copy(ROOT / name, target, ("__pycache__",))
        else:
            shutil.copy(ROOT / name, target)
    for name in MODULES:
        shutil.copytree(kernel.modules / name, root / "lib/modules" / kernel.version / name)
    for name in _needed(kernel, DRIVERS):
        target = root / "lib/modules" / kernel.version / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kernel.modules / name, target)
    (root / "etc/edge-agent").mkdir()
    (root / "etc/edge-agent/agent.toml").write_text(CONFIG)
    _add_kmod(root)
    subprocess.run(["depmod", "-b", str(root), kernel.version], check=True)
    _inside(root, "sh", "-c", INSTALL.replace("systemctl daemon-reload", ""))
    # the daemon's user could not keep what it compiles, and compiling is what takes longest in the machine
    _inside(root, "python3", "-m", "compileall", "-q", "-j", "2", SOURCE, PACKAGES)
    _inside(root, "sh", f"{SOURCE}/tests/vm/inside.sh", "prepare")
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(root), str(disk), DISK_SIZE], check=True)
    shutil.rmtree(root)
    return disk


def _needed(kernel: Kernel, drivers: tuple[str, ...]) -> list[str]:
    """Paths of these drivers' modules, and of all that they load (modules.dep(5))."""
    found: list[str] = []
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        if Path(path).name.partition(".")[0] in drivers:
            found += [path, *needs.split()]
    return found


def _add_kmod(root: Path) -> None:
    """The host's program that loads modules, with its libraries: the tree is of the same Debian and has none."""
    told = subprocess.run(["ldd", "/bin/kmod"], check=True, capture_output=True, text=True).stdout
    for name in ("/bin/kmod", *re.findall(r"=> (/\S+)", told)):
        target = root / name.lstrip("/")
        if not target.exists():
            shutil.copy(name, target)
    for name in ("modprobe", "insmod"):
        (root / "usr/sbin" / name).symlink_to("/bin/kmod")


def _copy(source: Path, target: Path, without: tuple[str, ...]) -> None:
    shutil.copytree(source, target, symlinks=False, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)


def _inside(root: Path, *command: str) -> None:
    """Run a command in the tree without booting it. Raises CalledProcessError; its output is shown."""
    subprocess.run(
        ["systemd-nspawn", "--quiet", f"--directory={root}", "--register=no", "--keep-unit", "--private-network",
         "--pipe", *command],
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
