"""What the daemon may not have in memory: the other side's runtimes, and modules that an idle daemon has no use for.

Each of these came in by somebody's import and costs up to 1.3 MB (docs/decisions/0017-memory-of-the-daemon.md).
"""

from __future__ import annotations

from pathlib import Path

FOREIGN = frozenset(
    {"numpy", "cv2", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "tensorrt", "zstandard"}
)
# by top-level name, as `edge-agent status --modules` tells them
NEEDLESS = frozenset(
    {
        "bz2", "csv", "decimal", "difflib", "distutils", "email", "fractions", "gzip", "html", "http", "lzma",
        "multiprocessing", "pdb", "psutil", "pydoc", "requests", "setuptools", "shutil", "sqlite3", "statistics",
        "stringprep", "tarfile", "tempfile", "unittest", "urllib3", "uuid", "xml", "zipfile", "zlib",
    }
)  # fmt: skip
# whose top-level name is needed for something else
NEEDLESS_PARTS = frozenset(
    {
        "agent.client", "agent.daemon.registrar", "agent.rescue", "agent.workbench", "cryptography.x509",
        "importlib.metadata", "ota.client.conformance", "ota.client.transports.directory",
        "ota.client.transports.https", "ota.client.transports.zip", "ota.publisher",
        "securesystemslib._gpg.functions", "urllib.request",
    }
)  # fmt: skip


def mapped_files(pid: int) -> set[str]:
    """Files mapped into a process."""
    fields = (line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {parts[5] for parts in fields if len(parts) == 6 and parts[5].startswith("/")}


def runtimes_mapped(pid: int) -> list[str]:
    """Files of a runtime, of NumPy or of OpenCV that are mapped into a process."""
    words = ("numpy", "cv2", "onnxruntime", "openvino", "litert", "tflite", "tensorrt", "zstandard")
    return sorted(file for file in mapped_files(pid) if any(word in file.lower() for word in words))
