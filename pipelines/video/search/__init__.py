"""Find in videos what a query names: when it is seen, and the frames that show it."""
