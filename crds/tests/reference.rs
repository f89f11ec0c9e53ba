//! The reference in docs/runnerpool.md says what the API is, and every example can be applied.

use std::fs;
use std::path::{Path, PathBuf};

use kube::CustomResourceExt;
use mayfly_crds::RunnerPool;
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Structs of Kubernetes itself, whose fields are its documentation's business.
const FOREIGN: [&str; 2] = ["spec.runner.tolerations", "status.conditions"];

#[test]
fn every_field_has_a_row_with_its_default_and_bounds() -> Outcome {
    let reference = read("docs/runnerpool.md")?;
    let mut missing = Vec::new();
    for root in ["spec", "status"] {
        walk(&schema()?[root], root, &mut |path, field| {
            let Some(row) = reference.lines().find(|line| line.starts_with(&format!("| `{path}` |"))) else {
                missing.push(format!("`{path}` has no row"));
                return;
            };
            for (what, value) in facts(field) {
                if !row.contains(&format!("`{value}`")) {
                    missing.push(format!("the row of `{path}` does not say {what} `{value}`"));
                }
            }
        });
    }
    assert!(missing.is_empty(), "docs/runnerpool.md:\n{}", missing.join("\n"));
    Ok(())
}

#[test]
fn every_field_of_the_reference_exists() -> Outcome {
    let mut known = Vec::new();
    for root in ["spec", "status"] {
        walk(&schema()?[root], root, &mut |path, _| known.push(path.to_owned()));
    }
    let reference = read("docs/runnerpool.md")?;
    let rows = reference.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(path, _)| path));
    let fields = rows.filter(|path| path.starts_with("spec.") || path.starts_with("status."));
    let strangers: Vec<&str> = fields.filter(|path| !known.iter().any(|field| field == path)).collect();
    assert!(strangers.is_empty(), "docs/runnerpool.md describes fields that do not exist: {strangers:?}");
    Ok(())
}

#[test]
fn every_condition_and_reason_is_explained() -> Outcome {
    let source = read("crds/src/conditions.rs")?;
    let words: Vec<&str> = source.lines().filter_map(|line| line.trim().strip_prefix("pub const ")?.split('"').nth(1)).collect();
    assert!(words.len() > 10, "conditions.rs is not read rightly: {words:?}");
    for page in ["docs/runnerpool.md", "docs/troubleshooting.md"] {
        let text = read(page)?;
        let missing: Vec<&&str> = words.iter().filter(|word| !text.contains(&format!("`{word}`"))).collect();
        assert!(missing.is_empty(), "{page} does not explain {missing:?}");
    }
    Ok(())
}

#[test]
fn every_example_is_a_runner_pool_of_known_fields() -> Outcome {
    let schema = schema()?;
    let mut count = 0;
    for (place, text) in examples()? {
        let value: Value = serde_saphyr::from_str(&text).map_err(|error| format!("{place}: {error}"))?;
        if value["kind"] != "RunnerPool" {
            continue;
        }
        let mut strangers = Vec::new();
        unknown(&value["spec"], &schema["spec"], "spec", &mut strangers);
        assert!(strangers.is_empty(), "{place}: fields that do not exist: {strangers:?}");
        serde_json::from_value::<RunnerPool>(value).map_err(|error| format!("{place}: {error}"))?;
        count += 1;
    }
    assert!(count >= 5, "only {count} examples were found");
    Ok(())
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}

/// The properties of the RunnerPool schema.
fn schema() -> Result<Value, serde_json::Error> {
    let crd = serde_json::to_value(RunnerPool::crd())?;
    Ok(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"].clone())
}

/// Calls `visit` for every field below `schema`, lists as `field[]`.
fn walk(schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        visit(&path, field);
        if FOREIGN.contains(&path.as_str()) {
            continue;
        }
        walk(field, &path, visit);
        walk(&field["items"], &format!("{path}[]"), visit);
    }
}

/// Default and bounds of a field, as the reference has to spell them.
fn facts(field: &Value) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    let default = &field["default"];
    if !default.is_object() && !default.is_null() && default != "" {
        facts.push(("its default", default.as_str().map_or_else(|| default.to_string(), str::to_owned)));
    }
    for (key, what) in [
        ("minimum", "its least value"),
        ("maximum", "its greatest value"),
        ("maxItems", "its greatest length"),
        ("maxLength", "its greatest length"),
        ("maxProperties", "its greatest size"),
    ] {
        // A least value of nothing needs no word.
        if let Some(number) = field[key].as_f64().filter(|number| *number > 0.0) {
            facts.push((what, number.to_string()));
        }
    }
    facts
}

/// Samples, and the YAML blocks of the documentation, document by document.
fn examples() -> Result<Vec<(String, String)>, std::io::Error> {
    let mut found = Vec::new();
    for folder in ["config/samples", "docs", "."] {
        for entry in fs::read_dir(root().join(folder))? {
            let path = entry?.path();
            let place = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
            let blocks: Vec<String> = match path.extension().and_then(|extension| extension.to_str()) {
                Some("yaml") => vec![fs::read_to_string(&path)?],
                Some("md") => fs::read_to_string(&path)?
                    .split("```yaml\n")
                    .skip(1)
                    .filter_map(|block| block.split_once("```").map(|(block, _)| block.to_owned()))
                    .collect(),
                _ => continue,
            };
            let documents = blocks.iter().flat_map(|block| block.split("\n---\n")).filter(|text| text.contains("kind: RunnerPool"));
            found.extend(documents.map(|text| (place.clone(), text.to_owned())));
        }
    }
    Ok(found)
}

/// Fields of `value` that the schema does not know: the API server would drop them without a word.
fn unknown(value: &Value, schema: &Value, path: &str, found: &mut Vec<String>) {
    if let Some(list) = value.as_array() {
        list.iter().for_each(|item| unknown(item, &schema["items"], &format!("{path}[]"), found));
    }
    let Some(known) = schema["properties"].as_object() else { return };
    for (name, field) in value.as_object().into_iter().flatten() {
        match known.get(name) {
            Some(schema) => unknown(field, schema, &format!("{path}.{name}"), found),
            None => found.push(format!("{path}.{name}")),
        }
    }
}
