"""What a run says when it fails: no memory left, a loss that is not finite, a loader's process that dies or hangs."""
