"""Everything that touches Megatron-Core or TransformerEngine; no other folder imports them."""
