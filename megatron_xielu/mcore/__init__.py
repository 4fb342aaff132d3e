"""Everything that touches Megatron-Core or TransformerEngine; no other folder imports them.

Importing this package enables the CPU platform on a machine without a GPU: Megatron binds some of
torch.cuda's functions while it is being imported, so that has to come first.
"""

from megatron_xielu.mcore import cpu_platform

cpu_platform.enable()
