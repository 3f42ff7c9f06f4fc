"""Few-step distillation: several networks in the memory of one, and what trains them."""
