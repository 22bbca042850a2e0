"""What stands between matrix products, in one pass over memory each way."""

from mad_kernels.elementwise.head_norm_gate import head_norm_gate
from mad_kernels.elementwise.rms_norm import add_rms_norm, rms_norm
from mad_kernels.elementwise.skip_gate import skip_gate
from mad_kernels.elementwise.swiglu import swiglu
from mad_kernels.elementwise.token_shift import token_shift

__all__ = ["add_rms_norm", "head_norm_gate", "rms_norm", "skip_gate", "swiglu", "token_shift"]
