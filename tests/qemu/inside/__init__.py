"""What runs in the guest: scenarios, by the file of what they have in common. A scenario is a function; its docstring
says what it asserts."""
