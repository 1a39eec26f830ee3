"""What the pages in docs/ are made with: figures of the committed data, drawings, and the site's hook."""
