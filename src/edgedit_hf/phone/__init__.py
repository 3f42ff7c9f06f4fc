"""The phone in the loop: what is measured on a device, what it sends back, and the latency table made of that."""
