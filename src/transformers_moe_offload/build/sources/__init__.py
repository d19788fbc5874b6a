"""The dense weights that go into a mixture of experts."""
