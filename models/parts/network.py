"""The parts detector's layers: a stride-8 convolutional network with a heat map and a box map (CenterNet style)."""

from __future__ import annotations

from models.export import Layer, Network

WIDTH = 112
BRANCH = 64


def _block(name: str, source: str, kernel: int) -> list[Layer]:
    return [
        Layer("depthwise", f"{name}_dw", (source,), kernel=kernel),
        Layer("conv", f"{name}_pw", (f"{name}_dw",), WIDTH, activation="none"),
        Layer("add", name, (source, f"{name}_pw")),
    ]


def _branch(name: str, source: str) -> list[Layer]:
    return [Layer("depthwise", f"{name}_dw", (source,), kernel=3), Layer("conv", f"{name}_pw", (f"{name}_dw",), BRANCH)]


PARTS = Network(
    input_shape=(240, 320, 3),
    layers=(
        Layer("conv", "stem1", ("x",), 16, kernel=3, stride=2),
        Layer("conv", "stem2", ("stem1",), 32, kernel=3, stride=2),
        Layer("depthwise", "mid_dw", ("stem2",), kernel=3),
        Layer("conv", "mid_pw", ("mid_dw",), 48),
        Layer("depthwise", "down_dw", ("mid_pw",), kernel=3, stride=2),
        Layer("conv", "down_pw", ("down_dw",), WIDTH),
        *_block("block1", "down_pw", 3),
        *_block("block2", "block1", 5),
        *_block("block3", "block2", 3),
        *_block("block4", "block3", 5),
        *_branch("heat", "block4"),
        Layer("conv", "heat", ("heat_pw",), 3, activation="sigmoid", normed=False),
        *_branch("box", "block4"),
        Layer("conv", "box", ("box_pw",), 4, activation="linear", normed=False),
    ),
    outputs=("heat", "box"),
)
"""Outputs: heat [30, 40, 3] in 0..1 and box [30, 40, 4] = (dx, dy, width, height) in cells of 8 pixels."""
