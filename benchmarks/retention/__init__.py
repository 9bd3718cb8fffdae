"""How much of a kept skill a sweep's winner retains, against full tuning at its best learning rate."""
