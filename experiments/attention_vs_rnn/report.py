def write_report(records, folder):
    return "todo"
