"""What a user types: parse, wire, hand over."""
