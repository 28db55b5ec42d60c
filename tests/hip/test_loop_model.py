"""The share of the matrix units' time in the modelled main loops: docs/amd.md has the table."""

import shutil

import pytest

from tools.build.loop_model import Instruction, basic_blocks, heaviest_path, loops, model_kernel

GOALS = {
    "forward_fp16_d64_plain": 0.60,
    "forward_fp16_d128_plain": 0.70,
    "backward_fp16_d64_plain": 0.55,
    "backward_fp16_d128_plain": 0.55,
}


@pytest.mark.parametrize("name", GOALS)
def test_share(kernels, name):
    kernel = next((one for one in kernels if one.instance.name == name), None)
    if kernel is None or shutil.which("llvm-mca") is None:
        pytest.skip("needs the kernel and llvm-mca")
    assert model_kernel(kernel).share >= GOALS[name]


def test_the_path_of_an_unmasked_step():
    """It loads and multiplies, and goes round the block that masks."""
    lines = [
        ("s_mov_b32 s0, 0", None),  # 0
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", None),  # 4: the loop begins
        ("s_cbranch_scc1 2", 20),
        ("v_cndmask_b32_e32 v0, v1, v2, vcc", None),
        ("v_mov_b32_e32 v0, 0", None),
        ("v_mfma_f32_32x32x8f16 v[0:15], v[16:17], v[18:19], v[0:15]", None),  # 20
        ("s_cbranch_scc0 1", 4),
        ("s_endpgm", None),
    ]
    blocks = basic_blocks([Instruction(4 * i, text, target) for i, (text, target) in enumerate(lines)])
    ((header, members),) = loops(blocks, 0)
    assert (header, members) == (4, frozenset({4, 12, 20}))
    assert [one.address for one in heaviest_path(blocks, header, members)] == [4, 8, 20, 24]
