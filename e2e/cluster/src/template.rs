//! Configuration files with `{{NAME}}` in them. Braces around anything but capitals are somebody else's.

use anyhow::{Result, bail};

/// Puts values in. A name without a value, or a value without a name, is a mistake of ours and an error.
pub fn render(template: &str, values: &[(&str, &str)]) -> Result<String> {
    let mut text = template.to_owned();
    for (name, value) in values {
        let placeholder = format!("{{{{{name}}}}}");
        if !text.contains(&placeholder) {
            bail!("the template has no {placeholder}");
        }
        text = text.replace(&placeholder, value);
    }
    for rest in text.split("{{").skip(1) {
        let name = rest.split("}}").next().unwrap_or_default();
        if !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') {
            bail!("the template asks for {{{{{name}}}}}");
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_value_and_every_value_a_name() {
        assert_eq!(render("a {{X}} {{X}} {{Y}}", &[("X", "1"), ("Y", "2")]).unwrap(), "a 1 1 2");
        assert_eq!(render("{{ .Name }} {{X}}", &[("X", "1")]).unwrap(), "{{ .Name }} 1");
        assert!(render("{{X}}", &[]).unwrap_err().to_string().contains("{{X}}"));
        assert!(render("a", &[("X", "1")]).is_err());
    }
}
