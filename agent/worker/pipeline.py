"""One frame's way through a worker, in order and timed: preprocess, session, postprocess.

It knows no socket, ring or file. Invariant: answers refer to the frame that went in, in its own pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.worker.delegates import Session
from agent.worker.graph import Graph
from agent.worker.postprocess import Items, compile_postprocess
from agent.worker.preprocess import Plan
from agent.worker.tensor import Array, TensorSpec, bind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.worker.sources import Frame


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of one frame, and what each stage took, in nanoseconds."""

    items: Items
    preprocess_ns: int
    inference_ns: int
    postprocess_ns: int


class Pipeline:
    """A loaded session with the way in and the way out that its release declares.

    Args:
        session: loaded.
        graph: parsed.
        inputs, outputs: specs in the release's order; empty takes the session's own.

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
        self._read = compile_postprocess(graph, self.outputs)
        self._plan: Plan | None = None
        self._size = (0, 0)

    def plan(self, height: int, width: int) -> Plan:
        """The preprocessing of frames of this size, compiled when it changes.

        Raises:
            ModelError: `model_shape` when the model takes no image.
        """
        if self._plan is None or self._size != (height, width):
            tensor = self.session.tensors[self._in_order[0]]
            self._plan = Plan(self._graph.preprocess, self.inputs[0], tensor, height, width)
            self._size = (height, width)
        return self._plan

    def run(self, frame: Frame) -> Answer:
        """Answer one frame, uint8 [height, width, 3] BGR; the frame is not needed any more afterwards."""
        started = time.perf_counter_ns()
        plan = self.plan(frame.shape[0], frame.shape[1])
        plan.run(frame)
        filled = time.perf_counter_ns()
        tensors = self.session.run()
        answered = time.perf_counter_ns()
        items = self._read([tensors[i] for i in self._out_order], plan.inverse)
        done = time.perf_counter_ns()
        return Answer(items, filled - started, answered - filled, done - answered)

    def outputs_of_image(self, frame: Frame) -> list[Array]:
        """The outputs for one frame in declared order; valid until the next run."""
        self.plan(frame.shape[0], frame.shape[1]).run(frame)
        return self._infer()

    def outputs_of_tensors(self, tensors: Sequence[Array]) -> list[Array]:
        """The outputs for inputs in declared order, each of its spec's shape and dtype; valid until the next run."""
        for index, tensor in zip(self._in_order, tensors, strict=True):
            self.session.tensors[index][...] = tensor
        return self._infer()

    def _infer(self) -> list[Array]:
        tensors = self.session.run()
        return [tensors[i] for i in self._out_order]
