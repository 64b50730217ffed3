"""The Triton kernels against the plain reference: in Triton's CPU interpreter, and on a GPU where there is one.

The interpreter checks no types: that the kernels compile for a GPU, and into what, is checked without one as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_scale.data.batch import IGNORE
from mf_scale.kernels.triton_cost import blocks
from tests.unit.triton_cases import CASES, by_kernels, compare_cost, make_pairs, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """By case: nothing, or what failed in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_cases"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


def test_what_does_not_fit_is_refused() -> None:
    pairs = make_pairs((1, 3, 3, 3), (9, 6), layers=2)
    for wrong in ([*pairs[:2], pairs[2][:, :1], *pairs[3:]], [*pairs[:4], pairs[4].float()]):
        with pytest.raises(ValueError, match=r"fit together|whole numbers"):
            by_kernels(wrong, settings())


# Compiled code


def compile_for_gpu(
    kernel: Any, tensors: dict[str, str], floats: set[str], form: dict[str, Any], aligned: tuple[str, ...] = ()
) -> Any:
    """Machine code of sm_90; needs no GPU. `form` gives the constants and num_warps, other arguments are int32.

    Tensors and `aligned` numbers are multiples of 16, as a launch finds out for itself.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in form.items() if name in kernel.arg_names}
    types = {name: tensors.get(name, "fp32" if name in floats else "i32") for name in kernel.arg_names}
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else kind for name, kind in types.items()},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name in (*tensors, *aligned)
                if name in kernel.arg_names and name not in constants
            },
        ),
        target=GPUTarget("cuda", 90, 32),
        options={name: value for name, value in form.items() if name not in constants},
    )


def transcendentals(compiled: Any) -> int:
    return len(re.findall(r"\b(ex2|lg2)\.approx", compiled.asm["ptx"]))


def carried(compiled: Any) -> set[str]:
    """Types of what the loops hand from one round to the next."""
    results = re.findall(r"scf\.for .* -> \((.*?)\)  ?: \w+ \{", compiled.asm["ttir"])
    return {kind for result in results for kind in re.split(r", ?(?![^<]*>)", result)}


def stack_bytes(compiled: Any, folder: Path) -> int:
    """What a thread keeps in memory for want of registers."""
    import triton

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"STACK:(\d+)", shown)
    assert found, shown
    return int(found[1])


@pytest.mark.parametrize("one", [(), ("h", "w", "H", "W", "L", "band_rows")], ids=["sizes", "sizes of one"])
@pytest.mark.parametrize("exclude", [False, True])
def test_mask_loss_compiles_to_three_transcendentals_a_pixel_and_no_atomics(
    exclude: bool, one: tuple[str, ...], tmp_path: Path
) -> None:
    from mf_scale.kernels import triton_mask_kernels as kernels

    names = ("sums", "coefficients", "gradient", "focal", "dice")
    tensors = {"logits": "*bf16", "segment_map": "*i16"} | dict.fromkeys(names, "*fp32")
    tensors |= dict.fromkeys(("segments", "layers", "counts"), "*i64")
    floats = {"alpha", "focal_weight", "dice_weight"}
    form = {"GAMMA": 2.0, "EXCLUDE": exclude, "IGNORE": IGNORE, "LAYERED": exclude and not one, "GPU": True}
    form |= {"COLUMNS": 1 if one else 4, "LANES": 128, "num_warps": 4, "enable_fp_fusion": True} | dict.fromkeys(one, 1)
    for kernel in (kernels.mask_loss_sums, kernels.mask_loss_gradient):
        compiled = compile_for_gpu(kernel, tensors, floats, form)
        assert one or transcendentals(compiled) == 3 * 4  # loops of known length are unrolled
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
        assert stack_bytes(compiled, tmp_path) == 0, "registers are spilled to memory"
        assert not {"i32", "i64"} & carried(compiled), "Triton 3.6 loses a whole number that is carried"
    finish = {"EXCLUDE": exclude, "BLOCK": 512, "enable_fp_fusion": True} | ({"pixels": 1} if one else {})
    assert compile_for_gpu(kernels.mask_loss_finish, tensors, floats, finish).asm["cubin"]


KIB = 1024


@pytest.mark.parametrize(("memory", "used"), [(99 * KIB, 97 * KIB), (163 * KIB, 116 * KIB)], ids=["99 KiB", "163 KiB"])
@pytest.mark.parametrize(("dtype", "segments"), [(torch.bfloat16, 15), (torch.float32, 15), (torch.bfloat16, 100)])
def test_cost_compiles_to_three_transcendentals_a_logit_in_the_shared_memory(
    dtype: torch.dtype, segments: int, memory: int, used: int, tmp_path: Path
) -> None:
    """Of GPUs since Ampere, and of A100 and H100."""
    from mf_scale.kernels import triton_cost_kernels as kernels

    embedding = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    tensors = dict.fromkeys(("inside", "whole", "areas", "costs", "probability"), "*fp32")
    tensors |= {"queries": embedding, "features": embedding, "maps": "*i16", "segment_map": "*i16"}
    tensors |= {"segment_layer": "*i64", "labels": "*i64"}
    floats = {"alpha", "class_weight", "focal_weight", "dice_weight"}
    form = blocks(600, 256, segments, 160 * 160, dtype, memory)
    form |= {"GAMMA": 2.0, "EXCLUDE": False, "IGNORE": IGNORE, "LAYERS": 1, "GPU": True}  # type: ignore[dict-item]
    compiled = compile_for_gpu(kernels.cost_sums, tensors, floats, form, aligned=("C", "pixels"))
    assert transcendentals(compiled) == 3 * form["BN"] * form["BP"] // (32 * form["num_warps"])
    assert compiled.metadata.shared <= used
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
    if segments == 15:
        assert stack_bytes(compiled, tmp_path) == 0, "registers are spilled to memory"
        assert compile_for_gpu(kernels.cost_finish, tensors, floats, {"BT": 16, "N": 1, "enable_fp_fusion": True}).asm[
            "cubin"
        ]
        assert compile_for_gpu(
            kernels.cost_maps, tensors, floats, {"BLOCK": 1024, "w": 1, "enable_fp_fusion": True}
        ).asm["cubin"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("cost") or "half" in name])
def test_as_the_reference_on_a_gpu(case: str) -> None:
    CASES[case]("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "exclude"), [(1, False), (2, True)])
@pytest.mark.parametrize("size", [(256, 320), (211, 333)])
def test_mask_loss_as_eager_on_a_gpu(size: tuple[int, int], layers: int, exclude: bool) -> None:
    from mf_scale.kernels import eager

    pairs = make_pairs((3, 40, 64, 80), size, layers=layers, segments=12, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = by_kernels(pairs, settings(exclude=exclude))
    assert torch.cuda.max_memory_allocated() - before < 2.2 * pairs[0].nbytes
    logits, segment_map, segments, layer, counts = pairs
    wanted = settings(exclude=exclude)
    right = eager.mask_loss(logits.double(), segment_map, segments, layer, counts, wanted, want_gradient=True)
    for mine, eagers in zip(got, right, strict=True):
        assert eagers is not None
        assert (mine - eagers).abs().max() <= 1e-5 * eagers.abs().max()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(got, by_kernels(pairs, wanted), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-4), (torch.float32, 5e-3)], ids=["bf16", "fp32 as TF32"]
)
@pytest.mark.parametrize(("segments", "layers"), [(15, 1), (40, 2), (300, 1)])
def test_cost_on_a_gpu(segments: int, layers: int, dtype: torch.dtype, tolerance: float) -> None:
    compare_cost(
        *((2, 2, 5, 256, 40, 56), (160, 224), segments),
        layers=layers,
        exclude=layers > 1,
        dtype=dtype,
        tolerance=tolerance,
        device="cuda",
    )
