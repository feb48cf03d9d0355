"""The method by which a model is exported; what it takes for that is imported when it is called."""

from __future__ import annotations

import os
from typing import Any


class ExportMixin:
    """What [`LLM2SLMForConditionalGeneration`] has of exporting."""

    def export(
        self,
        folder: str | os.PathLike,
        format: str = "onnx",
        int8: bool = False,
        processor: Any = None,
    ) -> Any:
        """
        Export the model as graphs for a runtime on CPUs.

        Args:
            folder (`str` or `os.PathLike`): Where to.
            format (`str`, defaults to `"onnx"`): `"onnx"` for ONNX Runtime or `"openvino"` for OpenVINO.
            int8 (`bool`, defaults to `False`): Keep matrices in int8, a quarter of the bytes that a step reads. Results
                change by rounding: of the matrices, and in ONNX Runtime of what they are multiplied with.
            processor ([`LLM2SLMProcessor`], *optional*): The processor, to be saved beside the graphs, where `pipeline` and
                `AutoProcessor` find it. By default the one that lies where the model was loaded from, if there is one.

        Returns:
            [`LLM2SLMExportedModel`], which generates as this model does. `LLM2SLMExportedModel.from_pretrained(folder)` loads
            it again. The folder holds the whole model, LLM included, as far as it is run.

        Raises:
            ImportError: without the extra of that name, or with a transformers that can't export so.
            ValueError: for a model without its LLM, or with a quantised one.
            RuntimeError: if it can't be exported, or if the export computes something else.
        """
        try:  # a checkpoint's copy of the code can't
            from transformers_llm2slm.export import export_model
        except ImportError as error:
            raise ImportError("Exporting needs the package transformers-llm2slm.") from error
        return export_model(self, folder, format, int8, processor)  # type: ignore[arg-type]  # it is that of the class
