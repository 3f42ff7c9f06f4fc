"""Lowering to ExecuTorch: networks in the form that XNNPACK runs, and delegates."""
