"""The programs that run a student on a device, one small module each. None of them imports torch before it converts something."""
