"""The parts of the pytest plugin, each loaded when asked for. `tractor_host.pytest_plugin` has the hooks."""
