"""The elastic supernet: which sub-networks a step trains, their losses, and the balance of their gradients."""
