def binary_search(items, target):
    low, high = 0, len(items) - 1
    while low <= high:
        <FILL>
        if items[middle] == target:
            return middle
        elif items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1
