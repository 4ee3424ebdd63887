"""What a run is, as frozen dataclasses by concern. Standard library only."""
