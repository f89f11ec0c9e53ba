module mayfly.dev/e2e/images/pause

go 1.26
