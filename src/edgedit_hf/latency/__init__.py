"""How latency is measured (`protocol`) and what can be measured (`runners`)."""
