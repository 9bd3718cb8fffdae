"""Measurements that can be made again, and the results that were committed."""
