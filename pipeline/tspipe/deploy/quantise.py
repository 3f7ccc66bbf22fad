"""Static quantisation of an ONNX export to 8-bit integers, by onnxruntime."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


def quantise(model: bytes, batches: Iterable[Array], input_name: str) -> bytes:
    """Return the model with weights int8, per channel, and activations uint8, in ONNX's QDQ format.

    Weights have seven bits of the eight: x86 processors without VNNI add pairs of products in 16 bits, which eight bits
    overflow.

    Args:
        batches: inputs of the model, whose smallest and largest activations give the scales.
        input_name: the name of the model's input.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no type hints
        """Yields one batch per call, then None."""

        def __init__(self, arrays: Iterator[Array]):
            self.arrays = arrays

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch."""
            images = next(self.arrays, None)
            return None if images is None else {input_name: images}

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        quantize_static(
            onnx.load_from_string(model),
            out,
            Reader(iter(batches)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        return out.read_bytes()
