//! Organizations, repositories and robots on the forge, for the demo and the tests.

use anyhow::Result;
use mayfly_cluster::Forge;
use serde_json::json;

use crate::World;

/// An organization with a robot that owns it and whose token is good for what a pool needs, and no more.
#[derive(Clone, Debug)]
pub struct Organization {
    /// Its name.
    pub name: String,
    /// The robot's name.
    pub robot: String,
    /// The robot's token: `write:organization` and `write:repository`.
    pub token: String,
    /// Secret of its webhook.
    pub webhook_secret: String,
}

impl Organization {
    /// Makes the organization and its robot, unless they are there; the token and the webhook secret are new.
    ///
    /// # Errors
    /// With the forge's answer.
    pub fn create(world: &World, name: &str) -> Result<Self> {
        let forge = &world.forge;
        let robot = format!("{name}-robot");
        let password = mayfly_cluster::command::random_hex(16)?;
        forge.create_org(name)?;
        if forge.has_user(&robot)? {
            forge.call(
                "PATCH",
                &format!("/admin/users/{robot}"),
                Some(&json!({"login_name": robot, "source_id": 0, "password": password})),
            )?;
        } else {
            forge.create_user(&robot, &password)?;
        }
        let teams = forge.call("GET", &format!("/orgs/{name}/teams"), None)?;
        let owners = teams.as_array().into_iter().flatten().find(|team| team["name"] == "Owners");
        if let Some(id) = owners.and_then(|team| team["id"].as_i64()) {
            forge.call("PUT", &format!("/teams/{id}/members/{robot}"), None)?;
        }
        let token_name = format!("mayfly-{}", mayfly_cluster::command::random_hex(4)?);
        let scopes = ["write:organization", "write:repository"];
        let token = forge.create_token((&robot, &password), &robot, &token_name, &scopes)?;
        let webhook_secret = mayfly_cluster::command::random_hex(16)?;
        Ok(Self { name: name.to_owned(), robot, token, webhook_secret })
    }

    /// The forge, as the robot.
    pub fn client(&self, world: &World) -> Forge {
        world.forge.with_token(&self.token)
    }
}
