"""The unfolded network and its parts."""
