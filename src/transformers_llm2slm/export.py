"""Export: a model as graphs for ONNX Runtime or OpenVINO, behind the same `generate`.

A model becomes three graphs, traced and converted by `transformers.exporters`: one reads a prompt (LLM, projector, fusion and,
where the SLM has one, its encoder), one makes of it what every step needs, or embeds tokens, and one is the SLM's step. Keys and
values go in and out of the step, so that they are where transformers' `generate` expects them.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .configuration_llm2slm import check_choice
from .evaluation import require_extra
from .export_graphs import ATTENTION, exporting, graphs_of
from .exported import LLM2SLMExportedModel, check_export
from .loading import quantization_of
from .pipeline_text2text import processor_beside
from .probes import eval_mode
from .shortlist import shortlisted

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

logger = logging.getLogger(__name__)

Format = Literal["onnx", "openvino"]
PACKAGES = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "nncf")}
# Weights that share a scale. A float32 scale for 128 costs 3 % of the size and keeps rounding local.
INT8_BLOCK = 128
# How far logits may be from the model's, as a share of their largest.
LIMITS = {"float32": 1e-3, "int8": 0.2}


def export_model(
    model: LLM2SLMForConditionalGeneration,
    folder: str | os.PathLike,
    format: str = "onnx",
    int8: bool = False,
    processor: LLM2SLMProcessor | None = None,
) -> LLM2SLMExportedModel:
    """See [`~LLM2SLMForConditionalGeneration.export`]."""
    check_choice("format", format, get_args(Format))
    require_extra(format, *PACKAGES[format])
    try:
        from transformers.exporters import ExportedModel  # noqa: F401
    except ImportError as error:
        raise ImportError("Exporting takes transformers 5.24 or newer: pip install -U transformers.") from error
    if model.llm is None:
        raise ValueError(
            "An export reads prompts too, but this model was loaded without its LLM (`load_llm=False`). Load it with its LLM."
        )
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{str(folder)!r} holds a checkpoint. Export to another folder, or to a subfolder of it.")
    processor = processor or processor_of(model)
    with eval_mode(model):
        exported = _exported(in_float32(model), folder, format, int8)
    if processor is not None:
        processor.save_pretrained(folder)
    return exported


def _exported(model: LLM2SLMForConditionalGeneration, folder: Path, format: str, int8: bool) -> LLM2SLMExportedModel:
    """The export of a model in eval mode, compared with it. Raises a `RuntimeError` where there is none that agrees."""
    failures: list[Exception] = []
    for attention in (ATTENTION, "eager"):  # the first is faster; a family may need more of an attention than it gives
        try:
            trace(model, format, int8, attention).save_pretrained(folder)
            exported = LLM2SLMExportedModel.from_pretrained(folder)
            difference = check_export(model, exported)
            limit = LIMITS["int8" if int8 else "float32"]
            if not difference <= limit:
                raise ValueError(f"its logits differ by {difference:.2g} of their largest, more than {limit:g}.")
            return exported
        except Exception as error:  # whatever torch.export, a converter or a runtime raises
            logger.info("The export with %s attention failed.", attention, exc_info=True)
            failures.append(error)
    reason = (str(failures[0]).strip() or "no message").splitlines()[0]
    raise RuntimeError(
        f"A {type(model.slm).__name__} behind a {type(model.llm).__name__} could not be exported as {format}: "
        f"{type(failures[0]).__name__}: {reason:.300} The model itself runs as before. Try the other format, or newer "
        "releases of transformers and the runtime."
    ) from failures[0]


def processor_of(model: LLM2SLMForConditionalGeneration) -> LLM2SLMProcessor | None:
    """The processor that lies where a model was loaded from; `None`, and a warning, where there is none."""
    try:
        return processor_beside(model, local_files_only=False)
    except (OSError, ValueError) as error:
        logger.warning(
            "The export will have no processor, which `pipeline` needs: pass it, `model.export(folder, processor=processor)`, or "
            "save it there, `processor.save_pretrained(folder)`. None was found: %s",
            str(error).splitlines()[0],
        )
        return None


def in_float32(model: LLM2SLMForConditionalGeneration) -> LLM2SLMForConditionalGeneration:
    """
    The model on the CPU and in float32, in which graphs are traced: itself, or a copy.

    Raises:
        ValueError: for a quantised LLM.
    """
    if model.llm is not None and quantization_of(model.llm) is not None:
        raise ValueError(
            f"The LLM's weights are quantised ({(quantization_of(model.llm) or {}).get('quant_method')}), which no graph takes. "
            "Load it in full precision, and export with `int8=True` for a small graph."
        )
    if all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()):
        return model
    return copy.deepcopy(model).to("cpu", torch.float32)


def trace(model: LLM2SLMForConditionalGeneration, format: str, int8: bool, attention: str) -> ExportedModel:
    """The graphs of a model in float32, converted."""
    from transformers.exporters import ExportedComponent, ExportedModel, OnnxExporter, OpenVINOExporter

    exporter = {"onnx": OnnxExporter, "openvino": OpenVINOExporter}[format]()
    components = {}
    listed = shortlisted(model.slm, model.shortlist, model.generation_config)
    with listed, exporting(model.slm, attention), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export's own use of what torch deprecates
        graphs = graphs_of(model)
        for name, graph in graphs.items():
            options: dict[str, Any] = {"ort_fusions": "cpu"} if format == "onnx" else {"stateful": False}
            if int8 and name != "embed":
                options["quantizer"] = int8_weights(format)
            options["dynamic_shapes"] = graph.dynamic_shapes
            config = exporter.config_class(**options)
            components[name] = ExportedComponent(*exporter.export_program(graph.module, graph.inputs, config))
    step = graphs["step"].inputs
    shapes = {name: [[tensor.shape[1], tensor.shape[3]] for tensor in step[name]] for name in ("keys", "values")}
    config = copy.deepcopy(model.config)
    config.export = {"format": format, "int8": int8, "cache_shapes": shapes}
    return ExportedModel(components, format, config=config, generation_config=model.generation_config)


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """The root logger as it was: onnxruntime's quantiser sets it to INFO as it is imported, for the whole process."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def int8_weights(format: str) -> Any:
    """A quantiser of transformers' exporters that keeps the matrices of a graph in int8."""
    if format == "openvino":
        import nncf
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

        return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_SYM))

    import onnx
    import onnx_ir

    with root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from transformers.exporters import ExportQuantizer

    class MatMulInt8Quantizer(ExportQuantizer):
        """Each constant matrix in int8, by blocks of its columns that share a scale, as `MatMulNBits` multiplies them.

        Its accuracy level 4 rounds what they are multiplied with to int8 too.
        """

        supported_formats = ("onnx",)

        def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: str) -> Any:
            config = DefaultWeightOnlyQuantConfig(INT8_BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
            with tempfile.TemporaryDirectory() as folder:  # files, since a protobuf message ends at 2 GB
                path = Path(folder, "model.onnx")
                onnx_ir.save(model, path, external_data="model.onnx.data")
                quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
                quantizer.process()
                quantizer.model.save_model_to_file(str(Path(folder, "int8.onnx")), True)
                quantized = onnx_ir.load(Path(folder, "int8.onnx"))
                onnx_ir.external_data.load_to_model(quantized)
            return quantized

    return MatMulInt8Quantizer()


__all__ = ["Format", "export_model"]
