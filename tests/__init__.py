"""The tests mirror the package; ``distributed`` holds the laws over ranks, ``helpers`` what tests share."""
