"""What a kernel call may be refused for."""


class KernelError(ValueError):
    """Tensors that do not fit each other or the plan."""


class UnsupportedError(KernelError):
    """A kernel named explicitly that cannot run this call here."""
