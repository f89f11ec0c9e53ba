//! The references in docs/runnerpool.md and docs/credentialbinding.md say what the API is, and every example can be applied.

use std::fs;
use std::path::{Path, PathBuf};

use kube::CustomResourceExt;
use mayfly_crds::{CredentialBinding, RunnerPool};
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Structs of Kubernetes itself, whose fields are its documentation's business.
const FOREIGN: [&str; 2] = ["spec.runner.tolerations", "status.conditions"];

/// The pages, and the kind that each is about.
const PAGES: [(&str, &str); 2] = [("docs/runnerpool.md", "RunnerPool"), ("docs/credentialbinding.md", "CredentialBinding")];

#[test]
fn every_field_has_a_row_with_its_default_and_bounds() -> Outcome {
    for (page, kind) in PAGES {
        let reference = read(page)?;
        let mut missing = Vec::new();
        for root in ["spec", "status"] {
            walk(&schema(kind)?[root], root, &mut |path, field| {
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
        assert!(missing.is_empty(), "{page}:\n{}", missing.join("\n"));
    }
    Ok(())
}

#[test]
fn every_field_of_the_reference_exists() -> Outcome {
    for (page, kind) in PAGES {
        let mut known = Vec::new();
        for root in ["spec", "status"] {
            walk(&schema(kind)?[root], root, &mut |path, _| known.push(path.to_owned()));
        }
        let reference = read(page)?;
        let rows = reference.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(path, _)| path));
        let fields = rows.filter(|path| path.starts_with("spec.") || path.starts_with("status."));
        let strangers: Vec<&str> = fields.filter(|path| !known.iter().any(|field| field == path)).collect();
        assert!(strangers.is_empty(), "{page} describes fields that do not exist: {strangers:?}");
    }
    Ok(())
}

#[test]
fn every_claim_of_a_binding_is_in_the_reference() -> Outcome {
    let reference = read("docs/credentialbinding.md")?;
    let claims = mayfly_crds::Claim::ALL.iter().map(|claim| claim.as_str());
    let missing: Vec<&str> = claims.filter(|claim| !reference.contains(&format!("| `{claim}` |"))).collect();
    assert!(missing.is_empty(), "docs/credentialbinding.md has no row for {missing:?}");
    Ok(())
}

#[test]
fn every_condition_and_reason_is_explained() -> Outcome {
    let source = read("crds/src/conditions.rs")?;
    let words: Vec<&str> = source.lines().filter_map(|line| line.trim().strip_prefix("pub const ")?.split('"').nth(1)).collect();
    assert!(words.len() > 10, "conditions.rs is not read rightly: {words:?}");
    let references = PAGES.iter().map(|(page, _)| read(page)).collect::<Result<String, _>>()?;
    for (page, text) in [("the references", references), ("docs/troubleshooting.md", read("docs/troubleshooting.md")?)] {
        let missing: Vec<&&str> = words.iter().filter(|word| !text.contains(&format!("`{word}`"))).collect();
        assert!(missing.is_empty(), "{page} does not explain {missing:?}");
    }
    Ok(())
}

#[test]
fn every_example_is_of_known_fields_and_can_be_used() -> Outcome {
    let (mut pools, mut bindings) = (0, 0);
    for (place, text) in examples()? {
        let value: Value = serde_saphyr::from_str(&text).map_err(|error| format!("{place}: {error}"))?;
        let Some((_, kind)) = PAGES.iter().find(|(_, kind)| value["kind"] == *kind) else { continue };
        let mut strangers = Vec::new();
        unknown(&value["spec"], &schema(kind)?["spec"], "spec", &mut strangers);
        assert!(strangers.is_empty(), "{place}: fields that do not exist: {strangers:?}");
        if *kind == "RunnerPool" {
            serde_json::from_value::<RunnerPool>(value).map_err(|error| format!("{place}: {error}"))?;
            pools += 1;
        } else {
            let binding: CredentialBinding = serde_json::from_value(value).map_err(|error| format!("{place}: {error}"))?;
            binding.spec.check().map_err(|fault| format!("{place}: {fault}"))?;
            bindings += 1;
        }
    }
    assert!(pools >= 5 && bindings >= 3, "only {pools} pools and {bindings} bindings were found");
    Ok(())
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}

/// The properties of a kind's schema.
fn schema(kind: &str) -> Result<Value, serde_json::Error> {
    let crd = if kind == "RunnerPool" { RunnerPool::crd() } else { CredentialBinding::crd() };
    let crd = serde_json::to_value(crd)?;
    Ok(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"].clone())
}

/// Calls `visit` for every field below `schema`, lists as `field[]`, and values of maps as `field.*`.
fn walk(schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        visit(&path, field);
        if FOREIGN.contains(&path.as_str()) {
            continue;
        }
        walk(field, &path, visit);
        walk(&field["items"], &format!("{path}[]"), visit);
        walk(&field["additionalProperties"], &format!("{path}.*"), visit);
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
            let documents = blocks
                .iter()
                .flat_map(|block| block.split("\n---\n"))
                .filter(|text| PAGES.iter().any(|(_, kind)| text.contains(&format!("kind: {kind}"))));
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
    if schema["additionalProperties"].is_object() {
        for (name, field) in value.as_object().into_iter().flatten() {
            unknown(field, &schema["additionalProperties"], &format!("{path}.{name}"), found);
        }
    }
    let Some(known) = schema["properties"].as_object() else { return };
    for (name, field) in value.as_object().into_iter().flatten() {
        match known.get(name) {
            Some(schema) => unknown(field, schema, &format!("{path}.{name}"), found),
            None => found.push(format!("{path}.{name}")),
        }
    }
}
