"""What the kernels take of the machine."""


def test_every_kernel_fits_the_machine(kernels):
    """No register is spilled, and a block's LDS fits in a compute unit even where it folds chunks."""
    assert {kernel.instance.name: kernel.problems for kernel in kernels if kernel.problems} == {}


def test_only_dynamic_lds(kernels):
    """Layouts count on a block's tiles beginning where LDS begins."""
    assert all(kernel.resources.lds_bytes == 0 for kernel in kernels)
