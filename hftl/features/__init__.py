"""What a frozen backbone says of every row, computed once: for heads, for choosing a backbone, for looking at data."""
