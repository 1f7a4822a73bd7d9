"""One frame's way through a worker, in order and timed: preprocess, session, postprocess.

It knows no socket, ring or file. Invariant: answers refer to the frame that went in, in its own pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from agent.errors import ModelError, Reason
from agent.worker.delegates import Session
from agent.worker.graph import Graph, Preprocess
from agent.worker.postprocess import compile_postprocess
from agent.worker.preprocess import Inverse, Plan, fill_constant
from agent.worker.results import Item
from agent.worker.tensor import Array, TensorSpec, bind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.worker.sources import Frame

BLANK_SHAPE = (480, 640, 3)
BLANK_GREY = 114


class InputPlan(Protocol):
    """What fills the input tensor from frames of one shape. `inverse` leads back to a picture's pixels."""

    inverse: Inverse | None

    def run(self, frame: Frame) -> None:
        """Fill the tensor; the frame is only read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of one frame, and what each stage took, in nanoseconds."""

    items: list[Item]
    preprocess_ns: int
    inference_ns: int
    postprocess_ns: int


class Pipeline:
    """A loaded session with the way in and the way out that its release declares.

    Args:
        session: loaded.
        graph: parsed.
        inputs, outputs: specs in the release's order; empty takes the session's own.

    Attributes:
        fed: which of `inputs` a frame fills.
        last: the outputs of the last run, in declared order.

    Raises:
        ModelError: `model_shape` when session and release disagree.
    """

    def __init__(
        self, session: Session, graph: Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self.session = session
        self._graph = graph
        self.inputs, self._in_order = bind(inputs, session.inputs, "input")
        self.outputs, self._out_order = bind(outputs, session.outputs, "output")
        self.fed = self._fed_input()
        self._straight = self._out_order == list(range(len(session.outputs)))
        self._given = [session.tensors[i] for i in self._in_order]
        if self.fed:
            self._given.insert(0, self._given.pop(self.fed))
        specs = (self.inputs[self.fed], *self.inputs[: self.fed], *self.inputs[self.fed + 1 :])
        self._read = compile_postprocess(graph, self.outputs, specs)
        self._plan: InputPlan | None = None
        self._shape: tuple[int, ...] = ()
        self.last: Sequence[Array] = ()

    def plan(self, shape: tuple[int, ...]) -> InputPlan:
        """The preprocessing of frames of this shape, compiled when it changes.

        Raises:
            ModelError: `model_shape` when the model does not take such frames.
        """
        if self._plan is None or self._shape != shape:
            self._plan = self._compile(shape)
            self._shape = shape
        return self._plan

    def blank(self) -> Frame:
        """A frame of a shape that the model takes, mid-grey or zero.

        Raises:
            ModelError: `model_shape` when it takes none.
        """
        declared = self._graph.preprocess
        if isinstance(declared, Preprocess):
            frame = np.full(BLANK_SHAPE, BLANK_GREY, np.uint8)
        else:
            frame = np.zeros((declared.window, declared.channels), np.float32)
        self.plan(frame.shape)
        return frame

    def run(self, frame: Frame) -> Answer:
        """Answer one frame: uint8 [height, width, 3] BGR, or float32 [samples, channels] of a sensor. It is not needed
        any more afterwards."""
        started = time.perf_counter_ns()
        plan = self._plan if self._shape == frame.shape and self._plan is not None else self.plan(frame.shape)
        plan.run(frame)
        filled = time.perf_counter_ns()
        tensors = self.infer()
        answered = time.perf_counter_ns()
        items = self._read(tensors, plan.inverse, self._given)
        done = time.perf_counter_ns()
        return Answer(items, filled - started, answered - filled, done - answered)

    def run_parts(self, frame: Frame, regions: Sequence[tuple[int, int, int, int]]) -> list[Answer]:
        """Answer parts of a picture, each x0, y0, x1, y1 in whole pixels within it, as if each were a picture; what is
        found has the coordinates of the whole.

        Raises:
            ModelError: `model_shape` of a model that takes no pictures.
        """
        plan = self.plan(frame.shape)
        if not isinstance(plan, Plan):
            raise ModelError(
                Reason.MODEL_SHAPE,
                "a sensor's window has no parts to look at",
                hint="a line on another needs a model that takes pictures",
            )
        answers = []
        try:
            for region in regions:
                plan.aim(region)
                answers.append(self.run(frame))
        finally:
            plan.aim((0, 0, frame.shape[1], frame.shape[0]))
        return answers

    def outputs_of_image(self, frame: Frame) -> Sequence[Array]:
        """The outputs for one frame in declared order; valid until the next run."""
        self.plan(frame.shape).run(frame)
        return self.infer()

    def outputs_of_tensors(self, tensors: Sequence[Array]) -> Sequence[Array]:
        """The outputs for inputs in declared order, each of its spec's shape and dtype; valid until the next run."""
        for index, tensor in zip(self._in_order, tensors, strict=True):
            self.session.tensors[index][...] = tensor
        self._plan = None  # constants may have been written over
        return self.infer()

    def infer(self) -> Sequence[Array]:
        """The outputs for what the inputs hold, in declared order and also as `last`; valid until the next run."""
        tensors = self.session.run()
        self.last = tensors if self._straight else [tensors[i] for i in self._out_order]
        return self.last

    def _fed_input(self) -> int:
        """Which of the declared inputs a frame fills."""
        declared = self._graph.preprocess
        name = declared.input if isinstance(declared, Preprocess) else ""
        names = [spec.name for spec in self.inputs]
        if name and name not in names:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"preprocess.input {name[:60]!r} is none of the model's inputs {', '.join(names)[:200]}",
                hint="correct input in [preprocess]",
            )
        return names.index(name) if name else 0

    def _compile(self, shape: tuple[int, ...]) -> InputPlan:
        declared, spec, tensor = self._graph.preprocess, self.inputs[self.fed], self._given[0]
        if not isinstance(declared, Preprocess):
            from agent.worker.signal import SignalPlan

            return SignalPlan(declared, spec, tensor, shape)
        if len(shape) != 3 or shape[2] != 3:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"the model takes pictures, its source gives {'x'.join(map(str, shape))} numbers",
                hint='preprocess.kind = "signal" reads a sensor',
            )
        plan = Plan(declared, spec, tensor, shape[0], shape[1])
        self._fill_constants(declared)
        return plan

    def _fill_constants(self, declared: Preprocess) -> None:
        constants = dict(declared.constants)
        for index, (spec, place) in enumerate(zip(self.inputs, self._in_order, strict=True)):
            if index == self.fed:
                continue
            if spec.name not in constants:
                if self._graph.task == "raw":
                    continue
                raise ModelError(
                    Reason.MODEL_SHAPE,
                    f"nobody says what input {spec.name[:60]!r} gets",
                    hint="give its values under constants in [preprocess]",
                )
            fill_constant(spec, self.session.tensors[place], constants.pop(spec.name))
        if constants:
            raise ModelError(
                Reason.MODEL_SHAPE,
                f"preprocess.constants names {', '.join(constants)[:100]}, which the model does not have",
                hint=f"its inputs are {', '.join(spec.name for spec in self.inputs)[:200]}",
            )
