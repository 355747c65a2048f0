"""Token mixers, one mechanism and one public class per file; the file name is the registry key."""
