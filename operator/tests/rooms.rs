//! The walls between the rooms of the operator: every import of one room by another has to be in the table of ARCHITECTURE.md.
//!
//! Read are `crate::room` (alone and in braces) and `super::…::room`; whole-line comments are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// For each room, the rooms it may import.
type Table = BTreeMap<String, BTreeSet<String>>;

#[test]
fn every_import_between_rooms_is_in_the_table_of_the_architecture() -> io::Result<()> {
    let operator = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources(&operator.join("src"))?;
    let rooms: BTreeSet<String> = sources.iter().filter_map(|(room, _)| room.clone()).collect();
    let table = table(&fs::read_to_string(operator.join("../ARCHITECTURE.md"))?);

    let named: BTreeSet<String> = table.keys().chain(table.values().flatten()).cloned().collect();
    assert!(named.is_subset(&rooms), "ARCHITECTURE.md has rooms that are not in operator/src: {:?}", named.difference(&rooms));
    assert!(table.keys().eq(&rooms), "the table of ARCHITECTURE.md has rows for {:?}, operator/src has {rooms:?}", table.keys());

    let mut faults = Vec::new();
    for (room, path) in &sources {
        // main.rs stands in no room: it may open every door.
        let Some(room) = room else { continue };
        for (line, imported) in imports(&fs::read_to_string(path)?, &rooms) {
            if imported != *room && !table[room].contains(&imported) {
                let path = path.strip_prefix(operator).unwrap_or(path).display();
                faults.push(format!("operator/{path}:{line}: room {room} imports {imported}"));
            }
        }
    }
    assert!(faults.is_empty(), "imports that the table in ARCHITECTURE.md does not have:\n{}", faults.join("\n"));
    Ok(())
}

#[test]
fn imports_are_found_in_all_their_forms() {
    let rooms: BTreeSet<String> = ["cli", "forge", "gc", "pool"].map(str::to_owned).into();
    let source = "use crate::forge::{Job, Run};\n// use crate::cli;\nuse crate::{\n    gc::{sweep, other},\n    pool,\n};\n\
                  use super::super::cli::Settings;\nuse mayfly_crate::pool;\nlet x = crate::elsewhere::y();\n";
    let found: Vec<(usize, String)> = imports(source, &rooms);
    let found: Vec<(usize, &str)> = found.iter().map(|(line, room)| (*line, room.as_str())).collect();
    assert_eq!(found, [(1, "forge"), (3, "gc"), (3, "pool"), (7, "cli")]);
}

/// Every source file with the room it is in.
fn sources(src: &Path) -> io::Result<Vec<(Option<String>, PathBuf)>> {
    let mut found = Vec::new();
    let mut folders = vec![src.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let first = path.strip_prefix(src).ok().and_then(|path| path.components().next());
                let room = first.map(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned());
                found.push((room.filter(|room| room != "main"), path));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The table below the heading `## Rooms`: the columns `room` and `may import`, whose names are in backticks.
fn table(markdown: &str) -> Table {
    let section = markdown.lines().skip_while(|line| line.trim() != "## Rooms").skip(1).take_while(|line| !line.starts_with("## "));
    let mut rows = section.filter(|line| line.starts_with('|')).map(cells);
    let header = rows.next().unwrap_or_default();
    let column = |name: &str| header.iter().position(|cell| cell == name).unwrap_or(usize::MAX);
    let (room, imports) = (column("room"), column("may import"));
    let names = |cell: Option<&String>| -> Vec<String> {
        cell.map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()).unwrap_or_default()
    };
    rows.filter_map(|row| Some((names(row.get(room)).pop()?, names(row.get(imports)).into_iter().collect()))).collect()
}

fn cells(row: &str) -> Vec<String> {
    row.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
}

/// Rooms that a source file names, with the line of each.
fn imports(source: &str, rooms: &BTreeSet<String>) -> Vec<(usize, String)> {
    let code: Vec<&str> = source.lines().map(|line| if line.trim_start().starts_with("//") { "" } else { line }).collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (at, start) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_') {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let named = heads(&code[at + start.len()..]);
        found.extend(named.into_iter().filter(|name| rooms.contains(name)).map(|name| (line, name)));
    }
    found.sort();
    found
}

/// First names of what follows `crate::`: one, or one for each entry in braces.
fn heads(path: &str) -> Vec<String> {
    let head = |text: &str| text.trim_start().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
    let Some(group) = path.trim_start().strip_prefix('{') else { return vec![head(path)] };
    let mut depth = 0;
    let mut entries = vec![String::new()];
    for letter in group.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => entries.push(String::new()),
            _ => {}
        }
        if let Some(entry) = entries.last_mut() {
            entry.push(letter);
        }
    }
    entries.iter().map(|entry| head(entry.trim_start_matches(','))).collect()
}
