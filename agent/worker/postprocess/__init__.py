"""From output tensors to answers: one file for each family of model heads, compiled once for a graph and its tensors.

They work on the quantized numbers as long as order is all that matters, and turn only what is kept into real values.
Invariants, whatever the tensors hold: no exception, at most `graph.MAX_ITEMS` items and `results.MAX_ANSWER_BYTES` of
JSON, finite numbers, scores of 0..1, coordinates in source pixels within the frame, and time bounded by the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.worker import graph as declared
from agent.worker.postprocess.anomaly import compile_anomaly
from agent.worker.postprocess.centernet import compile_centernet
from agent.worker.postprocess.classification import compile_classification
from agent.worker.postprocess.embedding import compile_embedding
from agent.worker.postprocess.heatmap import compile_heatmap
from agent.worker.postprocess.outputs import Postprocessor
from agent.worker.postprocess.raw import compile_raw
from agent.worker.postprocess.segmentation import compile_segmentation
from agent.worker.postprocess.ssd import compile_ssd, compile_ssd_in_graph
from agent.worker.postprocess.yolo import compile_yolo
from agent.worker.tensor import TensorSpec


def compile_postprocess(
    graph: declared.Graph, outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec] = ()
) -> Postprocessor:
    """The function that reads outputs of these specs, of a model fed by these inputs, the one from the source first.

    Raises:
        ModelError: `model_shape` when the tensors are not what the release declares.
    """
    plan = graph.postprocess
    if isinstance(plan, declared.Classification):
        return compile_classification(graph, plan, outputs)
    if isinstance(plan, declared.Centernet):
        return compile_centernet(graph, plan, outputs)
    if isinstance(plan, declared.Yolo):
        return compile_yolo(graph, plan, outputs, inputs)
    if isinstance(plan, declared.Ssd):
        return compile_ssd(graph, plan, outputs, inputs)
    if isinstance(plan, declared.SsdInGraph):
        return compile_ssd_in_graph(graph, plan, outputs, inputs)
    if isinstance(plan, declared.Segmentation):
        return compile_segmentation(graph, plan, outputs, inputs)
    if isinstance(plan, declared.Heatmap):
        return compile_heatmap(graph, plan, outputs, inputs)
    if isinstance(plan, declared.Embedding):
        return compile_embedding(plan, outputs)
    if isinstance(plan, declared.Anomaly):
        return compile_anomaly(plan, outputs, inputs)
    return compile_raw(outputs)
