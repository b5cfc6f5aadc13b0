"""Reads from the sources of Transformer Engine and of apex what we call of them, and writes it as a table.

    python -m tests.cuda.read_sources FOLDER LABEL > tests/cuda/contracts/LABEL.json

FOLDER is a source tree of NVIDIA/TransformerEngine or NVIDIA/apex; for example
`git --git-dir CLONE archive v2.12 transformer_engine | tar -x -C FOLDER`.  A table holds facts alone:
module and name -> parameters, each with its kind, whether it has a default, and what is done with a tensor
that is not contiguous: "copied", "refused", or "misread" as if it were.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEX, TE = "transformer_engine_torch", "transformer_engine.pytorch"
CSRC, PYTORCH = "transformer_engine/pytorch/csrc", "transformer_engine/pytorch"
NATIVE = {  # module -> where its functions are registered, and the names of those that we call
    TEX: (
        f"{CSRC}/extensions/pybind.cpp",
        ("rmsnorm_fwd", "rmsnorm_bwd", "swiglu", "dswiglu", "multi_tensor_adam", "multi_tensor_l2norm"),
    ),
    "fused_weight_gradient_mlp_cuda": ("csrc/megatron/fused_weight_gradient_dense.cpp", ("wgrad_gemm_accum_fp32",)),
    "fused_layer_norm_cuda": ("csrc/layer_norm_cuda.cpp", ("rms_forward_affine", "rms_backward_affine")),
    "amp_C": ("csrc/amp_C_frontend.cpp", ("multi_tensor_adam", "multi_tensor_l2norm")),
}
PYTHON = {  # module and name -> file, class, function
    f"{TE}.cpp_extensions.general_gemm": (f"{PYTORCH}/cpp_extensions/gemm.py", None, "general_gemm"),
    f"{TE}.DotProductAttention": (
        f"{PYTORCH}/attention/dot_product_attention/dot_product_attention.py", "DotProductAttention", "__init__",
    ),
    f"{TE}.DotProductAttention.forward": (
        f"{PYTORCH}/attention/dot_product_attention/dot_product_attention.py", "DotProductAttention", "forward",
    ),
    f"{TE}.tensor.float8_tensor.Float8CurrentScalingQuantizer": (
        f"{PYTORCH}/tensor/float8_tensor.py", "Float8CurrentScalingQuantizer", "__init__",
    ),
    f"{TE}.tensor.float8_tensor.Float8CurrentScalingQuantizer.__call__": (
        f"{PYTORCH}/quantized_tensor.py", "Quantizer", "__call__",
    ),
}  # fmt: skip
KINDS = {  # C++ -> what must be given
    "at::Tensor": "tensor", "py::handle": "object", "py::object": "object", "DType": "format", "int": "int",
    "float": "float", "double": "float", "bool": "bool", "at::optional<bool>": "bool", "at::IntArrayRef": "sizes",
    "std::vector<std::vector<at::Tensor>>": "tensors",
}  # fmt: skip


def between(text: str, start: int, pair: str = "()") -> str:
    """What stands in the brackets that open at or after `start`."""
    begin = text.index(pair[0], start)
    depth, at = 1, begin + 1
    while depth:
        depth += (text[at] == pair[0]) - (text[at] == pair[1])
        at += 1
    return text[begin + 1 : at - 1]


def parts(text: str) -> list[str]:
    """Cut at commas that are in no brackets."""
    out, depth = [""], 0
    for letter in re.sub(r"\s+", " ", text):
        depth += (letter in "<({") - (letter in ">)}")
        if letter == "," and not depth:
            out.append("")
        else:
            out[-1] += letter
    return [part.strip() for part in out]


def declared(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(name, kind) of the parameters of a C++ function."""
    place = re.search(rf"[\w>&] +{name}\(", text)
    assert place, f"{name} is declared nowhere"
    for part in parts(between(text, place.start())):
        kind, _, argument = part.partition("=")[0].strip().rpartition(" ")
        kind = re.sub(r"\bconst\b|&", "", kind).strip()
        yield argument.lstrip("&*"), KINDS[kind]


def strided(argument: str, kind: str, body: str) -> str:
    """What happens to a tensor that is not contiguous."""
    if kind == "tensors":
        return "refused" if "contiguous" in body else "misread"
    if re.search(rf"\b{argument}\w*\.contiguous\(\)", body) or "activation_helper<" in body:
        return "copied"
    return "refused" if re.search(rf"CHECK_(INPUT|CONTIGUOUS)\({argument}\)", body) else "misread"


def native(root: Path, module: str) -> Iterator[tuple[str, Any]]:
    """The functions of an extension, as pybind11 registers them."""
    file, names = NATIVE[module]
    registered = (root / file).read_text()
    files = [*sorted((root / file).parent.rglob("*.cpp"))] if module == TEX else [root / file]
    sources = "".join(f.read_text() for f in files)
    lists = root / "csrc/multi_tensor_apply.cuh"  # of apex: where lists of tensors are taken apart
    headers = (root / CSRC / "extensions.h").read_text() if module == TEX else registered
    for name in names:
        what, function, *rest = parts(between(registered, registered.index(f'm.def("{name}"')))
        assert what == f'"{name}"'
        function = function.lstrip("&").rpartition("::")[2]
        keywords = [m for part in rest for m in re.findall(r'py::arg\("(\w+)"\)', part)]
        own = [*declared(headers, function)]
        definition = re.search(rf"\b{function}\([^;{{]*\) *{{", sources)
        body = between(sources, definition.end() - 1, "{}") if definition else lists.read_text()
        inside = [*declared(definition[0].join((" x ", "")), function)] if definition else own
        rows = []
        for (argument, kind), (inner, _) in zip(own, inside, strict=True):
            row = {"name": argument, "kind": kind}
            # through py::handle too tensors come
            if kind in ("tensor", "tensors") or (kind == "object" and inner in ("input", "weight")):
                row["strided"] = strided(inner, kind, body)
            rows.append(row)
        yield f"{module}.{name}", {"keywords": keywords, "parameters": rows}


def python(root: Path, name: str) -> Any:
    """A function of a Python file."""
    file, of, function = PYTHON[name]
    body = ast.parse((root / file).read_text()).body
    if of:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == of).body
    found = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    given, rows = found.args, list[dict[str, Any]]()
    names = [*given.posonlyargs, *given.args]
    for i, argument in enumerate(names):
        if argument.arg != "self":
            rows.append({"name": argument.arg, "default": i >= len(names) - len(given.defaults)})
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        rows.append({"name": argument.arg, "default": default is not None, "only": True})
    return {"python": True, "parameters": rows}


def facts(root: Path) -> dict[str, Any]:
    """The table of a source tree, of whichever of the two it is."""
    if not (root / PYTORCH).exists():
        return {key: row for module in NATIVE if module != TEX for key, row in native(root, module)}
    table = dict(native(root, TEX)) | {name: python(root, name) for name in PYTHON}
    enum = (root / "transformer_engine/common/util/pybind_helper.h").read_text()
    table[f"{TEX}.DType"] = re.findall(r'"(k\w+)"', enum[enum.index('m, "DType"') : enum.index("NVTE_Bias_Type")])
    constants = (root / PYTORCH / "constants.py").read_text()
    table[f"{TE}.constants.TE_DType"] = re.findall(
        r"torch\.(\w+)", constants[constants.index("\nTE_DType") :].split("}")[0]
    )
    common = (root / CSRC / "common.cpp").read_text()
    copies = re.search(r"^\s*torch_tensor = torch_tensor\.contiguous\(\)", common, re.M)
    for row in table[f"{TE}.cpp_extensions.general_gemm"]["parameters"]:
        if row["name"] in ("A", "B", "out"):
            row["strided"] = "copied" if copies else "misread"
    quantizer = python_class(root / PYTORCH / "tensor/float8_tensor.py", "Float8CurrentScalingQuantizer")
    table["a quantizer keeps"] = sorted({"amax"} & set(re.findall(r"self\.(\w+) = ", quantizer)))
    converters = (root / CSRC / "type_converters.cpp").read_text()
    of_tensor = between(converters, converters.index("TensorWrapper NVTETensorFromFloat8Tensor"), "{}")
    table["a product reads of a quantized tensor"] = re.findall(r'attr\("(_\w+)"\)', of_tensor)
    return table


def python_class(file: Path, name: str) -> str:
    """The text of a class."""
    text = file.read_text()
    return next(ast.get_source_segment(text, n) or "" for n in ast.parse(text).body if getattr(n, "name", "") == name)


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in facts(Path(sys.argv[1])).items())
    sys.stdout.write(f'{{"source": {json.dumps(sys.argv[2])},\n"facts": {{\n{lines}\n}}}}\n')
