"""Temperature selection: scores collected, selectors trained and judged, speed."""
