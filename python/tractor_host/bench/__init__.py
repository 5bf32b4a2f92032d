"""Measurements that ship with the package: `tractor-host bench NAME`."""
